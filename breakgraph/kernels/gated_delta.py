"""The gated delta rule over packed sequences, its states in slots.

Launches depend on shapes alone: where requests begin and end, which slots they start from and
leave their states in, and how they are cut into chunks are read from device memory at every call.
So a captured call serves every later batch that fits its shapes, and nothing is kept from one call
to the next. A request without tokens reads no slot and writes none, and rows past the last request
are left alone.

For each value head, token ``t`` of a request turns the state ``S`` (``[K, V]``) into

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,  u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)

and gives ``S_t^T q_t`` (Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024). Keys and queries
are of length 1, queries times ``K ** -0.5`` after that; ``g = -exp(a_log) softplus(a + dt_bias)``
and ``beta = sigmoid(b)``, in float32. A key head serves ``Hv / Hk`` value heads in a row.

They are ``torch.library`` ops, so that a capture sees, and audits, what they read. On a CPU an op
is its reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from breakgraph.kernels.gated_delta_fla import (
    gated_delta_rule_on_cuda,
    gated_delta_step_on_cuda,
    require_gated_delta_kernels,
)

__all__ = [
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gated_delta_step",
    "gated_delta_step_reference",
    "require_gated_delta_kernels",
]

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor a_log, "
    "Tensor dt_bias, Tensor(a!) state, Tensor cu_seqlens, Tensor initial_slots, "
    "Tensor final_slots, Tensor chunks, Tensor chunk_offsets, int chunk_size, Tensor(b!) out) -> ()"
)
_library.define(
    "gated_delta_step(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor a_log, "
    "Tensor dt_bias, Tensor(a!) state, Tensor slots, Tensor(b!) out) -> ()"
)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_slots: torch.Tensor,
    final_slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_offsets: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """Run each request's tokens; write ``out`` and the states after the last tokens.

    Args:
        q: ``[rows, Hk, K]``; heads side by side, rows at any stride.
        k: as ``q``.
        v: ``[rows, Hv, V]``; heads side by side, rows at any stride.
        a: ``[rows, Hv]``, what the decay is made of; rows at any stride.
        b: ``[rows, Hv]``, what beta is made of; rows at any stride.
        a_log: float32 ``[Hv]``.
        dt_bias: float32 ``[Hv]``.
        state: float32 ``[num_slots, Hv, K, V]``; a slot is contiguous, slots at any stride.
        cu_seqlens: int32 ``[num_requests + 1]``, where each request's rows begin and end.
        initial_slots: int32 ``[num_requests]``, the slot to start from; -1 is zeros.
        final_slots: int32 ``[num_requests]``, the slot to leave the state in.
        chunks: int32 ``[num_chunks, 2]``, a request, and which chunk of it; those past the
            batch's are of a request without tokens.
        chunk_offsets: int32 ``[num_requests + 1]``, the first chunk of each request.
        chunk_size: tokens of a chunk; on CUDA 64.
        out: ``[rows, Hv, V]``, contiguous; its rows from ``cu_seqlens[-1]`` on are left alone.

    Raises:
        RuntimeError: on CUDA, if fla-core is not installed.
        ValueError: on CUDA, if its kernels do not take these shapes.
    """
    torch.ops.breakgraph.gated_delta_rule(
        *(q, k, v, a, b, a_log, dt_bias, state, cu_seqlens, initial_slots, final_slots),
        *(chunks, chunk_offsets, chunk_size, out),
    )


def gated_delta_rule_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_slots: torch.Tensor,
    final_slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_offsets: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """``gated_delta_rule`` in plain torch ops, a request after the other.

    It computes in float64: layers behind it magnify what rounding there is between a chunk and as
    many steps, and in float32 that was more than the tests' bounds allow.
    """
    bounds = cu_seqlens.tolist()
    live = slice(0, bounds[-1])
    groups = v.shape[1] // k.shape[1]
    queries = _of_length_1(q[live]).repeat_interleave(groups, 1) * q.shape[-1] ** -0.5
    keys = _of_length_1(k[live]).repeat_interleave(groups, 1)
    values = v[live].double()
    decay, beta = _gates(a[live], b[live], a_log, dt_bias)
    starts = state.index_select(0, initial_slots.clamp(min=0)).double()
    starts = torch.where((initial_slots < 0)[:, None, None, None], 0.0, starts)
    for request, slot in enumerate(final_slots.tolist()):
        begin, end = bounds[request : request + 2]
        if begin == end:
            continue
        last = starts[request]
        for first in range(begin, end, chunk_size):
            rows = slice(first, min(first + chunk_size, end))
            mixed, last = _chunk(
                *(queries[rows], keys[rows], values[rows], decay[rows], beta[rows], last)
            )
            out[rows] = mixed.to(out.dtype)
        state[slot] = last


def _chunk(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    start: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a chunk's tokens and the state after them, from the state before.

    What its tokens add to the state (``u``) depends on what the earlier ones did: a unit lower
    triangular system, solved at once.

    Args:
        queries: ``[tokens, Hv, K]``, scaled; keys, values alike.
        decay: ``[tokens, Hv]``, the log of what a token leaves of the state before it.
        beta: ``[tokens, Hv]``.
        start: ``[Hv, K, V]``.
    """
    queries, keys, values = (tensor.transpose(0, 1) for tensor in (queries, keys, values))
    beta = beta.T[:, :, None]
    since = decay.cumsum(0).T  # [Hv, tokens], the log of what is left of the start
    between = since[:, :, None] - since[:, None, :]
    # Later tokens have positive differences, whose exponentials may overflow.
    between = between.where(torch.ones_like(between, dtype=torch.bool).tril(), -torch.inf).exp()
    left = since.exp()[:, :, None]
    system = beta * (keys @ keys.mT) * between
    added = torch.linalg.solve_triangular(
        system, beta * (values - left * (keys @ start)), upper=False, unitriangular=True
    )
    mixed = left * (queries @ start) + (queries @ keys.mT * between) @ added
    until_end = (since[:, -1:] - since).exp()[:, :, None]
    last = left[:, -1:] * start + (keys * until_end).mT @ added
    return mixed.transpose(0, 1), last


def gated_delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One token a row: update each row's state in place, and write ``out``.

    Args:
        q: ``[rows, Hk, K]``; heads side by side, rows at any stride.
        k: as ``q``.
        v: ``[rows, Hv, V]``; heads side by side, rows at any stride.
        a: ``[rows, Hv]``, what the decay is made of; rows at any stride.
        b: ``[rows, Hv]``, what beta is made of; rows at any stride.
        a_log: float32 ``[Hv]``.
        dt_bias: float32 ``[Hv]``.
        state: float32 ``[num_slots, Hv, K, V]``; a slot is contiguous, slots at any stride.
        slots: int64 ``[rows]``. Rows that share a slot leave anything in it.
        out: ``[rows, Hv, V]``, contiguous.

    Raises:
        RuntimeError: on CUDA, if Triton is not installed.
    """
    torch.ops.breakgraph.gated_delta_step(q, k, v, a, b, a_log, dt_bias, state, slots, out)


def gated_delta_step_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``gated_delta_step`` in plain torch ops of static shapes, in float64."""
    groups = v.shape[1] // k.shape[1]
    queries = _of_length_1(q).repeat_interleave(groups, 1) * q.shape[-1] ** -0.5
    keys = _of_length_1(k).repeat_interleave(groups, 1)
    decay, beta = _gates(a, b, a_log, dt_bias)
    faded = state.index_select(0, slots).double() * decay.exp()[:, :, None, None]
    held = torch.einsum("rhkv,rhk->rhv", faded, keys)
    added = beta[:, :, None] * (v.double() - held)
    last = faded + keys[:, :, :, None] * added[:, :, None, :]
    out.copy_(torch.einsum("rhkv,rhk->rhv", last, queries))
    state.index_copy_(0, slots, last.to(state.dtype))


def _of_length_1(heads: torch.Tensor) -> torch.Tensor:
    heads = heads.double()
    return heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)


def _gates(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log of the decay, and beta: float64 ``[rows, Hv]`` each."""
    decay = -a_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    return decay, b.double().sigmoid()


_library.impl("gated_delta_rule", gated_delta_rule_reference, "CPU")
_library.impl("gated_delta_rule", gated_delta_rule_on_cuda, "CUDA")
_library.impl("gated_delta_step", gated_delta_step_reference, "CPU")
_library.impl("gated_delta_step", gated_delta_step_on_cuda, "CUDA")
