"""Depthwise causal convolution, then SiLU, over packed sequences with a state per request.

The launch depends on shapes alone: lengths, slots and chunks are read from device memory, so a
captured launch serves every later batch. A request's state is its last ``width - 1`` inputs. It
usually starts and ends in the same slot, so one program, that of the request's first chunk, both
reads and writes it: the old inputs first, the new ones after a barrier.

They are ``torch.library`` ops, so that a capture sees, and audits, what they read. On a CPU they
are the references.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from breakgraph.kernels.direct_launch import DirectLaunch, Specialization
from breakgraph.kernels.launch import import_triton, power_of_two

TILE_ROWS, TILE_CHANNELS, WARPS = 16, 128, 4
"""On an H200 10240 channels of 2048 tokens take 39 µs so and 16 tokens 3.5; tiles of 32 and 64 rows
take 40 to 55 and 4 to 6."""

STEP_CHANNELS = 256

tl: Any = None  # triton.language, once the kernels are made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state, Tensor cu_seqlens, "
    "Tensor initial_slots, Tensor final_slots, Tensor chunks, int chunk_size, Tensor(b!) out) -> ()"
)
_library.define(
    "causal_conv_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state, Tensor slots, "
    "Tensor(b!) out) -> ()"
)


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_slots: torch.Tensor,
    final_slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """Convolve each request's rows of ``x``, and leave its last inputs in its final slot.

    A request without rows is left alone, its slots too, and so are the rows past the last
    request's.

    Args:
        x: ``[rows, channels]``, its last dimension dense.
        weight: ``[channels, width]``; the last column meets the row itself.
        bias: ``[channels]`` or None.
        conv_state: ``[num_slots, width - 1, channels]``, oldest inputs first; a slot is dense.
        cu_seqlens: int32 ``[num_requests + 1]``, where each request's rows begin and end.
        initial_slots: int32 ``[num_requests]``, the inputs before a request's rows; -1 is zeros.
        final_slots: int32 ``[num_requests]``, where to leave its last inputs.
        chunks: int32 ``[num_chunks, 2]``, a request, and which chunk of it.
        chunk_size: rows of a chunk.
        out: ``[rows, channels]``, its last dimension dense.
    """
    torch.ops.breakgraph.causal_conv.default(
        *(x, weight, bias, conv_state, cu_seqlens, initial_slots, final_slots),
        *(chunks, chunk_size, out),
    )


def causal_conv_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``causal_conv`` of one row a request, its state shifted in place.

    Args:
        x: ``[rows, channels]``, its last dimension dense.
        weight: ``[channels, width]``.
        bias: ``[channels]`` or None.
        conv_state: ``[num_slots, width - 1, channels]``; a slot is dense.
        slots: int64 ``[rows]``, the state of each row. Rows that share one leave it, and their
            outputs, to chance.
        out: ``[rows, channels]``, its last dimension dense.
    """
    torch.ops.breakgraph.causal_conv_step.default(x, weight, bias, conv_state, slots, out)


def causal_conv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_slots: torch.Tensor,
    final_slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    """``causal_conv`` in plain torch ops, a request at a time, with lengths read by the host."""
    history = weight.shape[1] - 1
    filters, offset = weight.float().unsqueeze(1), None if bias is None else bias.float()
    bounds, initial, final = (t.tolist() for t in (cu_seqlens, initial_slots, final_slots))
    for request, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        before = conv_state.new_zeros(history, x.shape[1])
        if initial[request] >= 0:
            before = conv_state[initial[request]]
        inputs = torch.cat([before.to(x.dtype), x[begin:end]])
        mixed = F.conv1d(inputs.float().T, filters, offset, groups=x.shape[1])
        out[begin:end] = F.silu(mixed.T)
        conv_state[final[request]] = inputs[len(inputs) - history :].to(conv_state.dtype)


def causal_conv_step_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``causal_conv_step`` in plain torch ops of static shapes."""
    inputs = torch.cat([conv_state.index_select(0, slots), x.unsqueeze(1).to(conv_state.dtype)], 1)
    mixed = (inputs.float() * weight.float().T).sum(1)
    out.copy_(F.silu(mixed if bias is None else mixed + bias.float()))
    conv_state.index_copy_(0, slots, inputs[:, 1:])


def _on_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_slots: torch.Tensor,
    final_slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_size: int,
    out: torch.Tensor,
) -> None:
    special = _extend_special(
        *(weight.shape, bias is not None, chunk_size),
        *(x.stride(), weight.stride(), conv_state.stride(), out.stride()),
    )
    tiles = -(-chunk_size // min(TILE_ROWS, chunk_size))
    _kernels().extend(
        (-(-weight.shape[0] // TILE_CHANNELS), tiles, len(chunks)),
        (x, weight, weight if bias is None else bias, conv_state, out),
        (cu_seqlens, initial_slots, final_slots, chunks),
        special,
    )


def _step_on_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    special = _step_special(
        *(weight.shape, bias is not None),
        *(x.stride(), weight.stride(), conv_state.stride(), out.stride()),
    )
    _kernels().step(
        (-(-weight.shape[0] // STEP_CHANNELS), len(x), 1),
        (x, weight, weight if bias is None else bias, conv_state, out),
        (slots,),
        special,
    )


Strides = tuple[int, ...]


@cache
def _extend_special(
    shape: tuple[int, int],
    has_bias: bool,
    chunk_size: int,
    x: Strides,
    weight: Strides,
    conv_state: Strides,
    out: Strides,
) -> Specialization:
    _require_dense(x, conv_state, out)
    channels, width = shape
    tile_rows = min(TILE_ROWS, chunk_size)
    if width > tile_rows or tile_rows != power_of_two(tile_rows):
        # The state would be read by programs of later tiles, and the first one overwrites it.
        raise ValueError(
            f"the kernel computes tiles of {tile_rows} rows of a chunk of {chunk_size}, which has "
            f"to be a power of two and no less than the {width} taps of the filter"
        )
    constants = (
        *(channels, width, has_bias, x[0], *weight, *conv_state[:2], out[0]),
        *(chunk_size, tile_rows, TILE_CHANNELS, power_of_two(width - 1)),
    )
    return Specialization(constants, WARPS)


@cache
def _step_special(
    shape: tuple[int, int],
    has_bias: bool,
    x: Strides,
    weight: Strides,
    conv_state: Strides,
    out: Strides,
) -> Specialization:
    _require_dense(x, conv_state, out)
    channels, width = shape
    constants = (
        *(channels, width, has_bias, x[0], *weight, *conv_state[:2], out[0]),
        *(STEP_CHANNELS, power_of_two(width - 1)),
    )
    return Specialization(constants, WARPS)


def _require_dense(x: Strides, conv_state: Strides, out: Strides) -> None:
    if not x[-1] == conv_state[-1] == out[-1] == 1:
        raise ValueError(
            "x, conv_state and out need a dense last dimension, and have the strides "
            f"{x}, {conv_state} and {out}"
        )


_library.impl("causal_conv", causal_conv_reference, "CPU")
_library.impl("causal_conv", _on_cuda, "CUDA")
_library.impl("causal_conv_step", causal_conv_step_reference, "CPU")
_library.impl("causal_conv_step", _step_on_cuda, "CUDA")


class _Kernels(NamedTuple):
    extend: DirectLaunch
    step: DirectLaunch


@cache
def _kernels() -> _Kernels:
    """The Triton kernels; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit(do_not_specialize=["cu_seqlens", "initial_slots", "final_slots", "chunks"])
    def extend(  # type: ignore[no-untyped-def]
        x,
        weight,
        bias,
        conv_state,
        out,
        cu_seqlens,
        initial_slots,
        final_slots,
        chunks,
        CHANNELS: tl.constexpr,
        WIDTH: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        X_ROW: tl.constexpr,
        WEIGHT_ROW: tl.constexpr,
        WEIGHT_TAP: tl.constexpr,
        STATE_SLOT: tl.constexpr,
        STATE_ROW: tl.constexpr,
        OUT_ROW: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_W: tl.constexpr,
    ):
        HISTORY: tl.constexpr = WIDTH - 1
        request = tl.load(chunks + 2 * tl.program_id(2))
        which = tl.load(chunks + 2 * tl.program_id(2) + 1)
        first = tl.load(cu_seqlens + request).to(tl.int64)
        length = (tl.load(cu_seqlens + request + 1) - first).to(tl.int32)
        begin = which * CHUNK + tl.program_id(1) * BLOCK_T
        if begin >= length:
            return
        end = tl.minimum(length, (which + 1) * CHUNK)
        initial = tl.load(initial_slots + request).to(tl.int64)
        channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        held = channel < CHANNELS
        inputs = x + (first + begin) * X_ROW + channel[None, :]
        before = conv_state + tl.maximum(initial, 0) * STATE_SLOT + channel[None, :]

        row = tl.arange(0, BLOCK_T)
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + channel, mask=held, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(WIDTH):
            source = row + (tap - HISTORY)
            inside = (begin + source >= 0) & (begin + row < end)
            value = tl.load(
                inputs + source[:, None] * X_ROW, mask=inside[:, None] & held[None, :], other=0.0
            )
            if begin < HISTORY:
                stored = (begin + source < 0) & (initial >= 0)
                value += tl.load(
                    before + (begin + source + HISTORY)[:, None] * STATE_ROW,
                    mask=stored[:, None] & held[None, :],
                    other=0.0,
                ).to(value.dtype)
            factor = tl.load(weight + channel * WEIGHT_ROW + tap * WEIGHT_TAP, mask=held, other=0.0)
            total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
        total = total / (1.0 + tl.exp(-total))
        to = out + (first + begin) * OUT_ROW + row[:, None] * OUT_ROW + channel[None, :]
        tl.store(
            to,
            total.to(out.dtype.element_ty),
            mask=(begin + row < end)[:, None] & held[None, :],
        )

        if begin == 0:
            at = tl.arange(0, BLOCK_W)
            age = length - HISTORY + at
            kept = (at < HISTORY)[:, None] & held[None, :]
            newest = tl.load(
                inputs + age.to(tl.int64)[:, None] * X_ROW,
                mask=kept & (age >= 0)[:, None],
                other=0.0,
            )
            newest += tl.load(
                before + (age + HISTORY)[:, None] * STATE_ROW,
                mask=kept & ((age < 0) & (initial >= 0))[:, None],
                other=0.0,
            ).to(newest.dtype)
            # Other threads of this program may still have to read what is overwritten here.
            tl.debug_barrier()
            final = tl.load(final_slots + request).to(tl.int64)
            after = conv_state + final * STATE_SLOT + channel[None, :] + at[:, None] * STATE_ROW
            tl.store(after, newest.to(conv_state.dtype.element_ty), mask=kept)

    @triton.jit(do_not_specialize=["slots"])
    def step(  # type: ignore[no-untyped-def]
        x,
        weight,
        bias,
        conv_state,
        out,
        slots,
        CHANNELS: tl.constexpr,
        WIDTH: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        X_ROW: tl.constexpr,
        WEIGHT_ROW: tl.constexpr,
        WEIGHT_TAP: tl.constexpr,
        STATE_SLOT: tl.constexpr,
        STATE_ROW: tl.constexpr,
        OUT_ROW: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_W: tl.constexpr,
    ):
        HISTORY: tl.constexpr = WIDTH - 1
        row = tl.program_id(1).to(tl.int64)
        channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        held = channel < CHANNELS
        newest = tl.load(x + row * X_ROW + channel, mask=held, other=0.0)
        slot = tl.load(slots + row).to(tl.int64)
        at = tl.arange(0, BLOCK_W)
        states = conv_state + slot * STATE_SLOT + channel[None, :] + at[:, None] * STATE_ROW
        kept = (at < HISTORY)[:, None] & held[None, :]
        old = tl.load(states, mask=kept, other=0.0).to(tl.float32)
        taps = tl.load(
            weight + channel[None, :] * WEIGHT_ROW + at[:, None] * WEIGHT_TAP, mask=kept, other=0.0
        )
        factor = tl.load(weight + channel * WEIGHT_ROW + HISTORY * WEIGHT_TAP, mask=held, other=0.0)
        total = tl.sum(old * taps.to(tl.float32), 0)
        total += newest.to(tl.float32) * factor.to(tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + channel, mask=held, other=0.0).to(tl.float32)
        total = total / (1.0 + tl.exp(-total))
        tl.store(out + row * OUT_ROW + channel, total.to(out.dtype.element_ty), mask=held)

        shifted = tl.load(states + STATE_ROW, mask=kept & (at < HISTORY - 1)[:, None], other=0.0)
        shifted = tl.where((at == HISTORY - 1)[:, None], newest.to(shifted.dtype)[None, :], shifted)
        # Other threads of this program may still have to read what is overwritten here.
        tl.debug_barrier()
        tl.store(states, shifted, mask=kept)

    return _Kernels(extend=DirectLaunch(extend), step=DirectLaunch(step))
