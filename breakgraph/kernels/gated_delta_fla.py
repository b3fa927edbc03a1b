"""The gated delta rule on CUDA: stages of flash-linear-attention, and three kernels of our own.

Nothing here is read back to the host, tuned at a call or remembered of a batch: launches depend on
shapes alone. fla-core's public functions do all three (they count chunks on the host, remember
the count by the identity of ``cu_seqlens``, and tune each kernel at its first launch), so its
Triton kernels are launched directly, with the plan's chunks and with the tiles below.

A chunk's stages, as of Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024:

1. ours: keys and queries of length 1, beta, and the decay summed within the chunk, densely;
2. fla: the inverse of the chunk's triangular system;
3. fla: what the system makes of values (``u``) and of decayed keys (``w``);
4. ours: from chunk to chunk, the state before each and the tokens' true ``u``, from and to slots;
5. fla: the outputs, from the states before the chunks and the chunks' own tokens.

In bfloat16 they round intermediates, the states before each chunk among them, to bfloat16; states
in slots stay float32.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from breakgraph.kernels.launch import power_of_two

CHUNK = 64
"""Tokens of a chunk: the only size for which fla has the system and its inverse in one kernel."""

MAX_KEY_DIM = 256

# The best of an H200, 16 key heads and 32 value heads of 128 in bfloat16. There 2048 tokens of one
# request take 140 µs (16 more with 2 warps for the inverse), and a step of 64 rows takes 73, where
# its bytes take 62.
SUM_TILES = {"num_warps": 8}
INVERSE_TILES = {"num_warps": 1}
UW_TILES = {"num_warps": 4, "num_stages": 3}
OUT_TILES = {"num_warps": 4, "num_stages": 2}
STEP_BLOCK_V, STEP_TILES = 64, {"num_warps": 4}

MANY_PROGRAMS = 512
"""A scan of fewer waits for loads, and has more of them under way; one of more waits for memory,
and is of larger tiles. 2048 tokens of one request take 162 µs rather than 178, and those of 8
requests 157 rather than 177, all else equal."""

tl: Any = None  # triton.language, once the kernels are made


def require_gated_delta_kernels() -> None:
    """Make the CUDA kernels. Raises RuntimeError if fla-core or Triton is not installed."""
    try:
        _kernels()
        _fla()
    except ImportError as error:
        raise RuntimeError(
            "the gated delta rule on CUDA runs kernels of fla-core 0.6.0, which cannot be imported "
            f"({error}): pip install 'breakgraph[linear]', i.e. fla-core==0.6.0"
        ) from error


def gated_delta_rule_on_cuda(
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
    """``gated_delta_rule`` in five launches."""
    rows, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[1:]
    if chunk_size != CHUNK or key_dim > MAX_KEY_DIM or not out.is_contiguous():
        raise ValueError(
            f"the gated delta rule on CUDA takes chunks of {CHUNK} tokens (here {chunk_size}), "
            f"keys of up to {MAX_KEY_DIM} (here {key_dim}) and a contiguous out"
        )
    launch = _launches()
    (num_chunks, _), num_requests = chunks.shape, len(initial_slots)
    queries, keys = k.new_empty(rows, key_heads, key_dim), k.new_empty(rows, key_heads, key_dim)
    values, u = torch.empty_like(out), torch.empty_like(out)
    decay = k.new_empty(rows, heads, dtype=torch.float32)
    beta = torch.empty_like(decay)
    inverse = k.new_empty(rows, heads, CHUNK)
    w = k.new_empty(rows, heads, key_dim)
    states = k.new_empty(num_chunks, heads, key_dim, value_dim)

    wide = k.dtype == torch.float32
    many = num_requests * heads * -(-value_dim // 32) > MANY_PROGRAMS and not wide
    layer = (key_heads, heads, key_dim, value_dim, CHUNK)
    block_k, block_v = max(16, power_of_two(key_dim)), power_of_two(value_dim)
    scan_v = 64 if many else 32
    scan_tiles = {"num_warps": 4, "num_stages": 2 if many or wide else 3}
    out_k, out_v = (32, 32) if wide else (128, 64)
    # Of float32, fla's products would be of tf32 otherwise; those of the inverse are.
    exact = {"allowed_dot_input_precisions": ("ieee",)} if wide else {}
    tensors = (q, k, v, a, b, a_log, dt_bias, state, cu_seqlens, chunks, out)
    key = (layer, many, k.device.index, *[_specialization(tensor) for tensor in tensors])
    launch.summed(
        key,
        (num_chunks, key_heads, 1),
        *(q, k, v, a, b, a_log, dt_bias, cu_seqlens, chunks),
        *(queries, keys, values, decay, beta, inverse),
        *(q.stride(0), k.stride(0), v.stride(0), a.stride(0), b.stride(0)),
        *(*layer, block_k, block_v),
        options=SUM_TILES,
    )
    launch.inverse(
        key,
        (num_chunks, heads, 1),
        *(keys, decay, beta, inverse, cu_seqlens, chunks, rows),
        *(key_heads, heads, key_dim, CHUNK, 16, 64, True, True),  # BC, BK, USE_G, IS_VARLEN
        options=INVERSE_TILES,
    )
    launch.uw(
        key,
        (num_chunks, heads, 1),
        *(keys, values, beta, w, u, inverse, decay, cu_seqlens, chunks, rows),
        *(*layer, 64, 64, True, True),  # BK, BV, USE_G, IS_VARLEN
        options=UW_TILES | exact,
    )
    launch.scan(
        key,
        (-(-value_dim // scan_v), heads, num_requests),
        *(keys, w, u, decay, states, state),
        *(cu_seqlens, initial_slots, final_slots, chunk_offsets, state.stride(0)),
        *(*layer, block_k, scan_v),
        options=scan_tiles,
    )
    launch.out(
        key,
        (-(-value_dim // out_v) * num_chunks, heads, 1),
        *(queries, keys, u, states, decay, None, out, cu_seqlens, chunks, key_dim**-0.5, rows),
        # BK, BV, USE_G, USE_G_GAMMA, STATE_V_FIRST, IS_VARLEN
        *(*layer, out_k, out_v, True, False, False, True),
        options=OUT_TILES | exact,
    )


def _specialization(tensor: torch.Tensor) -> tuple[torch.dtype, bool, int]:
    """What Triton compiles a kernel for, of a tensor and the stride of its rows."""
    return tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.stride(0)


class _Launch:
    """A Triton kernel, launched as compiled for the same key before.

    Triton finds the compiled kernel by looking at every argument, which is most of what a launch
    costs the host: a call of the rule takes it 86 µs, and 126 through Triton's own search.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], *args: Any, options: dict[str, Any]
    ) -> None:
        """Launch with every parameter in its order.

        Args:
            key: of all that the kernel is compiled for; tensors made for the call are aligned.
            grid: programs along each axis.
            options: how to compile it.
        """
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[grid](*args, **options)
        else:
            compiled[grid](*args)


def gated_delta_step_on_cuda(
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
    """``gated_delta_step`` in one launch."""
    rows, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[1:]
    _step()[(-(-value_dim // STEP_BLOCK_V), heads, rows)](
        *(q, k, v, a, b, a_log, dt_bias, state, slots, out, key_dim**-0.5),
        *(q.stride(0), k.stride(0), v.stride(0), a.stride(0), b.stride(0)),
        *(state.stride(0), out.stride(0)),
        H=key_heads,
        HV=heads,
        K=key_dim,
        V=value_dim,
        BK=power_of_two(key_dim),
        BV=STEP_BLOCK_V,
        **STEP_TILES,
    )


@cache
def _launches() -> SimpleNamespace:
    require_gated_delta_kernels()
    made = vars(_kernels()) | vars(_fla())
    return SimpleNamespace(**{name: _Launch(kernel) for name, kernel in made.items()})


@cache
def _step() -> Any:
    try:
        return _kernels().step
    except ImportError as error:
        raise RuntimeError(
            "the gated delta step on CUDA is a Triton kernel, and triton is not installed: "
            "pip install triton"
        ) from error


@cache
def _fla() -> SimpleNamespace:
    """The kernels of fla-core, without what tunes them and what derives their flags."""
    from fla.ops.common.chunk_o import chunk_fwd_kernel_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_kkt_solve_kernel
    from fla.ops.gated_delta_rule.wy_fast import recompute_w_u_fwd_kernel
    from triton.runtime import JITFunction

    def bare(kernel: Any) -> Any:
        while not isinstance(kernel, JITFunction):
            kernel = kernel.fn
        return kernel

    return SimpleNamespace(
        inverse=bare(chunk_gated_delta_rule_fwd_kkt_solve_kernel),
        uw=bare(recompute_w_u_fwd_kernel),
        out=bare(chunk_fwd_kernel_o),
    )


@cache
def _kernels() -> SimpleNamespace:
    """The Triton kernels; made on first use, because Triton is there only where CUDA is."""
    global tl
    import triton
    import triton.language

    tl = triton.language

    # Where an array of the plan begins depends on the number of requests; a kernel specialized on
    # its alignment would be compiled again, for a second, in the middle of serving.
    plan = ["cu_seqlens", "chunks", "initial_slots", "final_slots", "chunk_offsets"]

    @triton.jit
    def gates(a, b, a_log, dt_bias):  # type: ignore[no-untyped-def]
        raw = a.to(tl.float32) + dt_bias.to(tl.float32)
        softplus = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(raw)))
        return -tl.exp(a_log.to(tl.float32)) * softplus, tl.sigmoid(b.to(tl.float32))

    @triton.jit(do_not_specialize=plan[:2])
    def summed(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        a,
        b,
        a_log,
        dt_bias,
        cu_seqlens,
        chunks,
        queries,
        keys,
        values,
        decay,
        beta,
        inverse,
        q_row,
        k_row,
        v_row,
        a_row,
        b_row,
        H: tl.constexpr,
        HV: tl.constexpr,
        K: tl.constexpr,
        V: tl.constexpr,
        BT: tl.constexpr,
        BK: tl.constexpr,
        BV: tl.constexpr,
    ):
        chunk = tl.program_id(0)
        key_head = tl.program_id(1)
        request = tl.load(chunks + chunk * 2)
        first = tl.load(cu_seqlens + request) + tl.load(chunks + chunk * 2 + 1) * BT
        end = tl.load(cu_seqlens + request + 1)
        if first >= end:
            return
        row = first + tl.arange(0, BT)
        live = row < end
        row = row.to(tl.int64)

        dim = tl.arange(0, BK)
        inside = live[:, None] & (dim < K)[None, :]
        to = (row * H + key_head)[:, None] * K + dim[None, :]
        head = key_head * K + dim[None, :]
        tile = tl.load(q + row[:, None] * q_row + head, mask=inside, other=0.0).to(tl.float32)
        tile *= tl.rsqrt(tl.sum(tile * tile, 1) + 1e-6)[:, None]
        tl.store(queries + to, tile.to(queries.dtype.element_ty), mask=inside)
        tile = tl.load(k + row[:, None] * k_row + head, mask=inside, other=0.0).to(tl.float32)
        tile *= tl.rsqrt(tl.sum(tile * tile, 1) + 1e-6)[:, None]
        tl.store(keys + to, tile.to(keys.dtype.element_ty), mask=inside)

        dim_v = tl.arange(0, BV)
        inside_v = live[:, None] & (dim_v < V)[None, :]
        other = tl.arange(0, BT)
        for value_head in tl.static_range(HV // H):
            at = key_head * (HV // H) + value_head
            to_head = row * HV + at
            tile_v = tl.load(
                v + row[:, None] * v_row + at * V + dim_v[None, :], mask=inside_v, other=0.0
            )
            tl.store(values + to_head[:, None] * V + dim_v[None, :], tile_v, mask=inside_v)
            logs, betas = gates(
                tl.load(a + row * a_row + at, mask=live, other=0.0),
                tl.load(b + row * b_row + at, mask=live, other=0.0),
                tl.load(a_log + at),
                tl.load(dt_bias + at),
            )
            # fla's kernels work in powers of two.
            sums = tl.cumsum(tl.where(live, logs, 0.0), 0) * 1.4426950408889634
            tl.store(decay + to_head, sums, mask=live)
            tl.store(beta + to_head, betas, mask=live)
            # fla writes the blocks of the inverse on and under the diagonal, and reads all.
            nothing = tl.zeros([BT, BT], inverse.dtype.element_ty)
            tl.store(inverse + to_head[:, None] * BT + other[None, :], nothing, mask=live[:, None])

    @triton.jit(do_not_specialize=[plan[0], *plan[2:]])
    def scan(  # type: ignore[no-untyped-def]
        keys,
        w,
        u,
        decay,
        states,
        state,
        cu_seqlens,
        initial_slots,
        final_slots,
        chunk_offsets,
        state_slot,
        H: tl.constexpr,
        HV: tl.constexpr,
        K: tl.constexpr,
        V: tl.constexpr,
        BT: tl.constexpr,
        BK: tl.constexpr,
        BV: tl.constexpr,
    ):
        head = tl.program_id(1)
        request = tl.program_id(2)
        begin = tl.load(cu_seqlens + request)
        end = tl.load(cu_seqlens + request + 1)
        if begin >= end:
            return
        dim = tl.arange(0, BK)
        dim_v = tl.program_id(0) * BV + tl.arange(0, BV)
        inside = (dim < K)[:, None] & (dim_v < V)[None, :]
        tile = dim[:, None] * V + dim_v[None, :]
        slot = tl.load(initial_slots + request).to(tl.int64)
        held = tl.load(
            state + slot * state_slot + head * K * V + tile, mask=inside & (slot >= 0), other=0.0
        )
        to = states + (tl.load(chunk_offsets + request).to(tl.int64) * HV + head) * K * V + tile
        for first in range(begin, end, BT):
            tl.store(to, held.to(states.dtype.element_ty), mask=inside)
            row = first + tl.arange(0, BT)
            live = row < end
            row = row.to(tl.int64)
            from_head = row * HV + head
            tile_w = tl.load(
                w + from_head[:, None] * K + dim[None, :],
                mask=live[:, None] & (dim < K)[None, :],
                other=0.0,
            )
            at_u = u + from_head[:, None] * V + dim_v[None, :]
            inside_u = live[:, None] & (dim_v < V)[None, :]
            added = tl.load(at_u, mask=inside_u, other=0.0)
            added -= tl.dot(tile_w, held.to(tile_w.dtype), input_precision="ieee")
            tl.store(at_u, added.to(u.dtype.element_ty), mask=inside_u)

            since = tl.load(decay + from_head, mask=live, other=0.0)
            total = tl.load(decay + (tl.minimum(first + BT, end) - 1).to(tl.int64) * HV + head)
            added *= tl.where(live, tl.exp2(total - since), 0.0)[:, None]
            tile_k = tl.load(
                keys + (row[None, :] * H + head // (HV // H)) * K + dim[:, None],
                mask=live[None, :] & (dim < K)[:, None],
                other=0.0,
            )
            new = added.to(tile_k.dtype)
            held = tl.dot(tile_k, new, held * tl.exp2(total), input_precision="ieee")
            to += HV * K * V
        slot = tl.load(final_slots + request).to(tl.int64)
        tl.store(state + slot * state_slot + head * K * V + tile, held, mask=inside)

    @triton.jit
    def step(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        a,
        b,
        a_log,
        dt_bias,
        state,
        slots,
        out,
        scale,
        q_row,
        k_row,
        v_row,
        a_row,
        b_row,
        state_slot,
        out_row,
        H: tl.constexpr,
        HV: tl.constexpr,
        K: tl.constexpr,
        V: tl.constexpr,
        BK: tl.constexpr,
        BV: tl.constexpr,
    ):
        head = tl.program_id(1)
        row = tl.program_id(2).to(tl.int64)
        dim = tl.arange(0, BK)
        dim_v = tl.program_id(0) * BV + tl.arange(0, BV)
        inside = (dim < K)[:, None] & (dim_v < V)[None, :]
        at = tl.load(slots + row) * state_slot + head * K * V + dim[:, None] * V + dim_v[None, :]
        held = tl.load(state + at, mask=inside, other=0.0)
        key_head = head // (HV // H) * K + dim
        query = tl.load(q + row * q_row + key_head, mask=dim < K, other=0.0).to(tl.float32)
        query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6) * scale
        key = tl.load(k + row * k_row + key_head, mask=dim < K, other=0.0).to(tl.float32)
        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        value = tl.load(v + row * v_row + head * V + dim_v, mask=dim_v < V, other=0.0)
        log, beta = gates(
            tl.load(a + row * a_row + head),
            tl.load(b + row * b_row + head),
            tl.load(a_log + head),
            tl.load(dt_bias + head),
        )
        held *= tl.exp(log)
        added = beta * (value.to(tl.float32) - tl.sum(held * key[:, None], 0))
        held += key[:, None] * added[None, :]
        tl.store(state + at, held, mask=inside)
        mixed = tl.sum(held * query[:, None], 0)
        to = out + row * out_row + head * V + dim_v
        tl.store(to, mixed.to(out.dtype.element_ty), mask=dim_v < V)

    return SimpleNamespace(summed=summed, scan=scan, step=step)
