"""The Mamba-2 recurrence over packed sequences, a state per request and head.

The launch depends on shapes alone: lengths, slots and chunks are read from device memory, so a
captured launch serves every later batch. Per token, in float32, with one scalar decay a head::

    dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)
    state = exp(-exp(a_log) * dt) * state + dt * outer(x, b)
    y = state @ c + d * x

Whole sequences are computed in chunks (state space duality: Dao & Gu, 2024): one kernel carries
the state from chunk to chunk and leaves what enters each, with the steps and the sums of their
decays; a second computes every chunk's outputs from that. Both find a head's group in ``b`` and
``c``; neither is repeated to the heads. Chunks of 128 rows are the fastest on an H200.

They are ``torch.library`` ops, so that a capture sees, and audits, what they read. On a CPU they
are the references.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from breakgraph.kernels.mamba2_cuda import scan_on_cuda, step_on_cuda

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "mamba2_scan(Tensor x, Tensor b, Tensor c, Tensor dt, Tensor a_log, Tensor d, Tensor dt_bias, "
    "float dt_min, float dt_max, Tensor(a!) state, Tensor cu_seqlens, Tensor initial_slots, "
    "Tensor final_slots, Tensor chunks, Tensor chunk_offsets, int chunk_size, Tensor(b!) out) -> ()"
)
_library.define(
    "mamba2_step(Tensor x, Tensor b, Tensor c, Tensor dt, Tensor a_log, Tensor d, Tensor dt_bias, "
    "float dt_min, float dt_max, Tensor(a!) state, Tensor slots, Tensor(b!) out) -> ()"
)


def mamba2_scan(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_min: float,
    dt_max: float,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_slots: torch.Tensor,
    final_slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_offsets: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """Run the recurrence over each request's rows, and leave its state in its final slot.

    A request without rows is left alone, its slots too, and so are the rows past the last
    request's.

    Args:
        x: ``[rows, heads, head_dim]``; the last dimension dense, as of all that follow.
        b: ``[rows, groups, state_dim]``; head ``h`` reads group ``h // (heads // groups)``.
        c: as ``b``.
        dt: ``[rows, heads]``, as projected.
        a_log: ``[heads]``, log of the decay rate.
        d: ``[heads]``, factor of the skip connection.
        dt_bias: ``[heads]``.
        dt_min: least step, after softplus.
        dt_max: largest step.
        state: float32 ``[num_slots, heads, head_dim, state_dim]``.
        cu_seqlens: int32 ``[num_requests + 1]``, where each request's rows begin and end.
        initial_slots: int32 ``[num_requests]``, the state before a request's rows; -1 is zeros.
        final_slots: int32 ``[num_requests]``, where to leave its state.
        chunks: int32 ``[num_chunks, 2]``, a request, and which chunk of it.
        chunk_offsets: int32 ``[num_requests + 1]``, the first chunk of each request.
        chunk_size: rows of a chunk.
        out: ``[rows, heads, head_dim]``.
    """
    torch.ops.breakgraph.mamba2_scan.default(
        *(x, b, c, dt, a_log, d, dt_bias, dt_min, dt_max, state, cu_seqlens),
        *(initial_slots, final_slots, chunks, chunk_offsets, chunk_size, out),
    )


def mamba2_step(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_min: float,
    dt_max: float,
    state: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``mamba2_scan`` of one row a request, its state updated in place.

    Args:
        x: ``[rows, heads, head_dim]``; the last dimension dense, as of all that follow.
        b: ``[rows, groups, state_dim]``.
        c: as ``b``.
        dt: ``[rows, heads]``, as projected.
        a_log: ``[heads]``.
        d: ``[heads]``.
        dt_bias: ``[heads]``.
        dt_min: least step, after softplus.
        dt_max: largest step.
        state: float32 ``[num_slots, heads, head_dim, state_dim]``.
        slots: int64 ``[rows]``, the state of each row. Rows that share one leave it, and their
            outputs, to chance.
        out: ``[rows, heads, head_dim]``.
    """
    torch.ops.breakgraph.mamba2_step.default(
        x, b, c, dt, a_log, d, dt_bias, dt_min, dt_max, state, slots, out
    )


def mamba2_scan_reference(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_min: float,
    dt_max: float,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_slots: torch.Tensor,
    final_slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_offsets: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """``mamba2_scan`` in plain torch ops, a chunk at a time, with lengths read by the host."""
    groups = b.shape[1]
    bounds, initial, final = (t.tolist() for t in (cu_seqlens, initial_slots, final_slots))
    for request, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        carried = torch.zeros_like(state[0], dtype=torch.float32)
        if initial[request] >= 0:
            carried = state[initial[request]].float()
        carried = carried.unflatten(0, (groups, -1))
        for first in range(begin, end, chunk_size):
            rows = slice(first, min(first + chunk_size, end))
            steps, log_decay = _steps(dt[rows], a_log, dt_bias, dt_min, dt_max)
            y, carried = _chunk(x[rows], b[rows], c[rows], steps, log_decay, carried)
            out[rows] = y + d.float()[:, None] * x[rows].float()
        state[final[request]] = carried.flatten(0, 1).to(state.dtype)


def mamba2_step_reference(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_min: float,
    dt_max: float,
    state: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``mamba2_step`` in plain torch ops of static shapes."""
    heads_per_group = x.shape[1] // b.shape[1]
    keys, queries = (t.float().repeat_interleave(heads_per_group, 1) for t in (b, c))
    steps, log_decay = _steps(dt, a_log, dt_bias, dt_min, dt_max)
    carried = state.index_select(0, slots).float() * log_decay.exp()[..., None, None]
    carried += (x.float() * steps[..., None])[..., None] * keys[:, :, None]
    y = (carried * queries[:, :, None]).sum(-1)
    out.copy_(y + d.float()[:, None] * x.float())
    state.index_copy_(0, slots, carried.to(state.dtype))


def _steps(
    dt: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_min: float,
    dt_max: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step of each token and head, and the logarithm of its decay; float32 as ``dt``."""
    steps = F.softplus(dt.float() + dt_bias.float()).clamp(dt_min, dt_max)
    return steps, -a_log.float().exp() * steps


def _chunk(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    steps: torch.Tensor,
    log_decay: torch.Tensor,
    carried: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of one chunk without the skip connection, and the state after it.

    ``carried`` is ``[groups, heads / groups, head_dim, state_dim]``. Letters: l and s are rows,
    g and h a group and a head in it, p of head_dim, n of state_dim.
    """
    groups, heads_per_group = carried.shape[:2]
    keys, queries = b.float(), c.float()
    values = (x.float() * steps[..., None]).unflatten(1, (groups, heads_per_group))
    total = log_decay.cumsum(0).unflatten(1, (groups, heads_per_group))
    spans = total[:, None] - total[None]
    rows = torch.arange(len(x), device=x.device)
    causal = (rows[:, None] >= rows)[..., None, None]
    decay = spans.masked_fill(~causal, float("-inf")).exp()
    scores = torch.einsum("lgn,sgn->lsg", queries, keys)[..., None] * decay
    y = torch.einsum("lsgh,sghp->lghp", scores, values)
    y += torch.einsum("lgn,ghpn->lghp", queries, carried) * total.exp()[..., None]
    left = values * (total[-1] - total).exp()[..., None]
    carried = carried * total[-1].exp()[..., None, None]
    return y.flatten(1, 2), carried + torch.einsum("lghp,lgn->ghpn", left, keys)


_library.impl("mamba2_scan", mamba2_scan_reference, "CPU")
_library.impl("mamba2_scan", scan_on_cuda, "CUDA")
_library.impl("mamba2_step", mamba2_step_reference, "CPU")
_library.impl("mamba2_step", step_on_cuda, "CUDA")
