"""The CUDA side of ``mamba2``: three Triton kernels and their launches.

A grid follows from the shapes of the plan alone; a program whose request or chunk holds no token
returns at once. Slots lie up to 2³¹ elements and more apart, so offsets of states are 64 bits wide.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from breakgraph.kernels.direct_launch import DirectLaunch, Specialization
from breakgraph.kernels.launch import import_triton, power_of_two

CARRY_BLOCK, CARRY_WARPS, CARRY_STAGES = 64, 4, 2
"""Of ``state_dim`` a program holds this much, for all of ``head_dim``. On an H200 2048 tokens of
NemotronH-8B (128 heads of 64, state 128) in chunks of 128 take 45 µs so, 52 with the whole state
in a program, 85 with a quarter; in chunks of 64 they take 72. Three stages leave a multiprocessor
room for two programs: 8 requests of 2 tokens take 8 µs more so."""

OUTPUT_ROWS, OUTPUT_WARPS, OUTPUT_STAGES = 64, 4, 1
"""Rows of a chunk that a program computes: the same tokens take 64 µs so, 91 with 32 rows, 110
with 128. Two stages take 85: they cost shared memory, and so programs that run side by side."""

STEP_BLOCK, STEP_WARPS = 16, 4
"""Of ``head_dim`` a program of the step holds this much: 64 rows take 134 µs, 125 is what the
bytes of their states take; blocks of 8 to 64 differ by 5%."""

tl: Any = None  # triton.language, once the kernels are made
_step_size: Any = None  # a function of theirs


def scan_on_cuda(
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
    """``mamba2_scan`` by Triton."""
    kernels, num_chunks, heads = _kernels(), len(chunks), x.shape[1]
    splits, tiles, carry, outputs = _scan_specials(
        *(x.shape[1:], b.shape[1:], x.dtype == torch.float32, dt_min, dt_max, chunk_size),
        *(x.stride(), b.stride(), c.stride(), dt.stride(), state.stride(), out.stride()),
    )
    entering = x.new_empty(num_chunks, heads, b.shape[2], x.shape[2])
    steps = x.new_empty(num_chunks, heads, 2, chunk_size, dtype=torch.float32)
    kernels.carry(
        (splits, heads, len(initial_slots)),
        (x, b, dt, a_log, dt_bias, state, entering, steps),
        (cu_seqlens, initial_slots, final_slots, chunk_offsets),
        carry,
    )
    kernels.outputs(
        (heads, tiles, num_chunks),
        (x, b, c, d, entering, steps, out),
        (cu_seqlens, initial_slots, chunks),
        outputs,
    )


def step_on_cuda(
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
    """``mamba2_step`` by Triton."""
    splits, special = _step_special(
        *(x.shape[1:], b.shape[1:], dt_min, dt_max),
        *(x.stride(), b.stride(), c.stride(), dt.stride(), state.stride(), out.stride()),
    )
    _kernels().step(
        (splits, x.shape[1], len(x)),
        (x, b, c, dt, a_log, d, dt_bias, state, out),
        (slots,),
        special,
    )


Strides = tuple[int, ...]


@cache
def _scan_specials(
    heads_and_dim: tuple[int, int],
    groups_and_dim: tuple[int, int],
    exact: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    x: Strides,
    b: Strides,
    c: Strides,
    dt: Strides,
    state: Strides,
    out: Strides,
) -> tuple[int, int, Specialization, Specialization]:
    """Programs that share a head's state and a chunk's rows, and how to compile both kernels."""
    _require_dense(x=x, b=b, c=c, state=state, out=out)
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"the kernels need chunks of 16, 32, 64, ... rows, not {chunk_size}")
    (heads, head_dim), (groups, state_dim) = heads_and_dim, groups_and_dim
    block_p, block_n = max(16, power_of_two(head_dim)), max(16, power_of_two(state_dim))
    carry_block, tile = min(CARRY_BLOCK, block_n), min(OUTPUT_ROWS, chunk_size)
    carry = (
        *(dt_min, dt_max, heads, heads // groups, head_dim, state_dim),
        *(*x[:2], *b[:2], *dt, *state[:3], chunk_size, block_p, carry_block),
    )
    outputs = (
        *(heads, heads // groups, head_dim, state_dim),
        *(*x[:2], *b[:2], *c[:2], *out[:2], chunk_size, tile, block_p, block_n),
    )
    return (
        -(-state_dim // carry_block),
        -(-chunk_size // tile),
        Specialization(carry, CARRY_WARPS, 1 if exact else CARRY_STAGES),
        Specialization(outputs, OUTPUT_WARPS, OUTPUT_STAGES),
    )


@cache
def _step_special(
    heads_and_dim: tuple[int, int],
    groups_and_dim: tuple[int, int],
    dt_min: float,
    dt_max: float,
    x: Strides,
    b: Strides,
    c: Strides,
    dt: Strides,
    state: Strides,
    out: Strides,
) -> tuple[int, Specialization]:
    """Programs that share a head's state, and how to compile the kernel."""
    _require_dense(x=x, b=b, c=c, state=state, out=out)
    (heads, head_dim), (groups, state_dim) = heads_and_dim, groups_and_dim
    block_p = min(STEP_BLOCK, power_of_two(head_dim))
    constants = (
        *(dt_min, dt_max, heads // groups, head_dim, state_dim),
        *(*x[:2], *b[:2], *c[:2], *dt, *state[:3], *out[:2]),
        *(block_p, power_of_two(state_dim)),
    )
    return -(-head_dim // block_p), Specialization(constants, STEP_WARPS)


def _require_dense(**strides: Strides) -> None:
    gaps = {name: found for name, found in strides.items() if found[-1] != 1}
    if gaps:
        raise ValueError(f"a dense last dimension is needed, and these strides have gaps: {gaps}")


class _Kernels(NamedTuple):
    carry: DirectLaunch
    outputs: DirectLaunch
    step: DirectLaunch


@cache
def _kernels() -> _Kernels:
    """The Triton kernels; made on first use, because Triton is there only where CUDA is."""
    global tl, _step_size
    triton, tl = import_triton()

    @triton.jit
    def step_size(dt, bias, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr):  # type: ignore[no-untyped-def]
        dt = dt.to(tl.float32) + bias.to(tl.float32)
        # softplus, with log1p so that small steps keep their digits
        small = tl.exp(-tl.abs(dt))
        whole = 1.0 + small
        log1p = tl.where(whole == 1.0, small, tl.log(whole) * (small / (whole - 1.0)))
        dt = tl.maximum(dt, 0.0) + log1p
        return tl.minimum(tl.maximum(dt, DT_MIN), DT_MAX)

    _step_size = step_size

    @triton.jit(do_not_specialize=["cu_seqlens", "initial_slots", "final_slots", "chunk_offsets"])
    def carry(  # type: ignore[no-untyped-def]
        x,
        b,
        dt,
        a_log,
        dt_bias,
        state,
        entering,
        steps,
        cu_seqlens,
        initial_slots,
        final_slots,
        chunk_offsets,
        DT_MIN: tl.constexpr,
        DT_MAX: tl.constexpr,
        HEADS: tl.constexpr,
        HEADS_PER_GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        STATE_DIM: tl.constexpr,
        X_ROW: tl.constexpr,
        X_HEAD: tl.constexpr,
        B_ROW: tl.constexpr,
        B_GROUP: tl.constexpr,
        DT_ROW: tl.constexpr,
        DT_HEAD: tl.constexpr,
        STATE_SLOT: tl.constexpr,
        STATE_HEAD: tl.constexpr,
        STATE_P: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        request = tl.program_id(2)
        head = tl.program_id(1)
        first = tl.load(cu_seqlens + request).to(tl.int64)
        length = (tl.load(cu_seqlens + request + 1) - first).to(tl.int32)
        if length <= 0:
            return
        initial = tl.load(initial_slots + request).to(tl.int64)
        final = tl.load(final_slots + request).to(tl.int64)
        p = tl.arange(0, BLOCK_P)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.arange(0, CHUNK)
        held = (n < STATE_DIM)[:, None] & (p < HEAD_DIM)[None, :]
        slot = state + head * STATE_HEAD + p[None, :] * STATE_P + n[:, None]
        rate = -tl.exp(tl.load(a_log + head).to(tl.float32)) * 1.4426950408889634  # for exp2
        bias = tl.load(dt_bias + head)

        inputs = x + first * X_ROW + head * X_HEAD + row[:, None] * X_ROW + p[None, :]
        keys = b + first * B_ROW + (head // HEADS_PER_GROUP) * B_GROUP
        keys += row[:, None] * B_ROW + n[None, :]
        raw = dt + first * DT_ROW + head * DT_HEAD + row * DT_ROW
        chunk = tl.load(chunk_offsets + request).to(tl.int64)
        enters = entering + (chunk * HEADS + head) * (STATE_DIM * HEAD_DIM)
        enters += n[:, None] * HEAD_DIM + p[None, :]
        sizes = steps + (chunk * HEADS + head) * (2 * CHUNK) + row
        alone = row < tl.where(tl.program_id(0) == 0, CHUNK, 0)  # one program writes the steps

        carried = tl.load(
            slot + tl.maximum(initial, 0) * STATE_SLOT, mask=held & (initial >= 0), other=0.0
        ).to(tl.float32)
        for begin in range(0, length, CHUNK):
            # Zeros, which a new request starts from, are neither written nor read.
            tl.store(
                enters,
                carried.to(entering.dtype.element_ty),
                mask=held & ((begin > 0) | (initial >= 0)),
            )
            live = begin + row < length
            size = _step_size(tl.load(raw, mask=live, other=0.0), bias, DT_MIN, DT_MAX)
            size = tl.where(live, size, 0.0)
            decay = tl.cumsum(size * rate, 0)
            whole = tl.sum(size * rate, 0)
            tl.store(sizes, size, mask=alone)
            tl.store(sizes + CHUNK, decay, mask=alone)
            key = tl.load(keys, mask=live[:, None] & (n < STATE_DIM)[None, :], other=0.0)
            value = tl.load(inputs, mask=live[:, None] & (p < HEAD_DIM)[None, :], other=0.0)
            value = value.to(tl.float32) * (size * tl.exp2(whole - decay))[:, None]
            carried = carried * tl.exp2(whole)
            carried = tl.dot(tl.trans(key), value.to(key.dtype), carried, input_precision="ieee")
            inputs += CHUNK * X_ROW
            keys += CHUNK * B_ROW
            raw += CHUNK * DT_ROW
            sizes += HEADS * 2 * CHUNK
            enters += HEADS * STATE_DIM * HEAD_DIM
        tl.store(slot + final * STATE_SLOT, carried.to(state.dtype.element_ty), mask=held)

    @triton.jit(do_not_specialize=["cu_seqlens", "initial_slots", "chunks"])
    def outputs(  # type: ignore[no-untyped-def]
        x,
        b,
        c,
        d,
        entering,
        steps,
        out,
        cu_seqlens,
        initial_slots,
        chunks,
        HEADS: tl.constexpr,
        HEADS_PER_GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        STATE_DIM: tl.constexpr,
        X_ROW: tl.constexpr,
        X_HEAD: tl.constexpr,
        B_ROW: tl.constexpr,
        B_GROUP: tl.constexpr,
        C_ROW: tl.constexpr,
        C_GROUP: tl.constexpr,
        OUT_ROW: tl.constexpr,
        OUT_HEAD: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        chunk = tl.program_id(2)
        head = tl.program_id(0)
        group = head // HEADS_PER_GROUP
        request = tl.load(chunks + 2 * chunk)
        which = tl.load(chunks + 2 * chunk + 1)
        first = tl.load(cu_seqlens + request).to(tl.int64) + which * CHUNK
        length = tl.minimum(tl.load(cu_seqlens + request + 1) - first, CHUNK).to(tl.int32)
        tile = tl.program_id(1) * BLOCK_T
        if tile >= length:
            return
        enters = (which > 0) | (tl.load(initial_slots + request) >= 0)
        p = tl.arange(0, BLOCK_P)
        n = tl.arange(0, BLOCK_N)
        at = tile + tl.arange(0, BLOCK_T)
        p_held, n_held = p < HEAD_DIM, n < STATE_DIM

        queries = c + first * C_ROW + group * C_GROUP + at[:, None] * C_ROW + n[None, :]
        query = tl.load(queries, mask=(at < length)[:, None] & n_held[None, :], other=0.0)
        states = entering + (chunk.to(tl.int64) * HEADS + head) * (STATE_DIM * HEAD_DIM)
        state = tl.load(
            states + n[:, None] * HEAD_DIM + p[None, :],
            mask=n_held[:, None] & p_held[None, :] & enters,
            other=0.0,
        )
        sizes = steps + (chunk.to(tl.int64) * HEADS + head) * (2 * CHUNK)
        decay = tl.load(sizes + CHUNK + at)
        y = tl.dot(query, state, input_precision="ieee") * tl.exp2(decay)[:, None]
        inputs = x + first * X_ROW + head * X_HEAD + p[None, :]
        keys = b + first * B_ROW + group * B_GROUP + n[None, :]
        for begin in range(0, tile + BLOCK_T, BLOCK_T):
            source = begin + tl.arange(0, BLOCK_T)
            live = (source < length)[:, None]
            key = tl.load(keys + source[:, None] * B_ROW, mask=live & n_held[None, :], other=0.0)
            value = tl.load(
                inputs + source[:, None] * X_ROW, mask=live & p_held[None, :], other=0.0
            )
            span = decay[:, None] - tl.load(sizes + CHUNK + source)[None, :]
            span = tl.where(at[:, None] >= source[None, :], span, float("-inf"))
            weights = tl.dot(query, tl.trans(key), input_precision="ieee")
            weights *= tl.exp2(span) * tl.load(sizes + source)[None, :]
            y = tl.dot(weights.to(key.dtype), value, y, input_precision="ieee")
        held = (at < length)[:, None] & p_held[None, :]
        skipped = tl.load(inputs + at[:, None] * X_ROW, mask=held, other=0.0)
        y += tl.load(d + head).to(tl.float32) * skipped.to(tl.float32)
        to = out + first * OUT_ROW + head * OUT_HEAD + at[:, None] * OUT_ROW + p[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=held)

    @triton.jit(do_not_specialize=["slots"])
    def step(  # type: ignore[no-untyped-def]
        x,
        b,
        c,
        dt,
        a_log,
        d,
        dt_bias,
        state,
        out,
        slots,
        DT_MIN: tl.constexpr,
        DT_MAX: tl.constexpr,
        HEADS_PER_GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        STATE_DIM: tl.constexpr,
        X_ROW: tl.constexpr,
        X_HEAD: tl.constexpr,
        B_ROW: tl.constexpr,
        B_GROUP: tl.constexpr,
        C_ROW: tl.constexpr,
        C_GROUP: tl.constexpr,
        DT_ROW: tl.constexpr,
        DT_HEAD: tl.constexpr,
        STATE_SLOT: tl.constexpr,
        STATE_HEAD: tl.constexpr,
        STATE_P: tl.constexpr,
        OUT_ROW: tl.constexpr,
        OUT_HEAD: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        row = tl.program_id(2).to(tl.int64)
        head = tl.program_id(1)
        group = head // HEADS_PER_GROUP
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        n = tl.arange(0, BLOCK_N)
        n_held, p_held = n < STATE_DIM, p < HEAD_DIM
        held = p_held[:, None] & n_held[None, :]
        where = tl.load(slots + row).to(tl.int64) * STATE_SLOT + head * STATE_HEAD
        states = state + where + p[:, None] * STATE_P + n[None, :]
        carried = tl.load(states, mask=held, other=0.0).to(tl.float32)
        value = tl.load(x + row * X_ROW + head * X_HEAD + p, mask=p_held, other=0.0)
        key = tl.load(b + row * B_ROW + group * B_GROUP + n, mask=n_held, other=0.0)
        query = tl.load(c + row * C_ROW + group * C_GROUP + n, mask=n_held, other=0.0)
        size = tl.load(dt + row * DT_ROW + head * DT_HEAD)
        size = _step_size(size, tl.load(dt_bias + head), DT_MIN, DT_MAX)
        value = value.to(tl.float32)
        carried *= tl.exp(-tl.exp(tl.load(a_log + head).to(tl.float32)) * size)
        carried += (value * size)[:, None] * key.to(tl.float32)[None, :]
        tl.store(states, carried.to(state.dtype.element_ty), mask=held)
        y = tl.sum(carried * query.to(tl.float32)[None, :], 1)
        y += tl.load(d + head).to(tl.float32) * value
        to = out + row * OUT_ROW + head * OUT_HEAD + p
        tl.store(to, y.to(out.dtype.element_ty), mask=p_held)

    return _Kernels(
        carry=DirectLaunch(carry), outputs=DirectLaunch(outputs), step=DirectLaunch(step)
    )
