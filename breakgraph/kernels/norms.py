"""RMS normalisation of rows: alone, after an addition, and by groups with a gate.

Everything is computed in float32 and rounded where the layers of transformers round: ``rms_norm``
once at the end, ``add_rms_norm`` the sum as well, ``gated_rms_norm`` the normalised value before
its weight. Weights may have another dtype than the rows. A row of zeros stays zero, so padded
rows are finite.

Each is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU the op
is its plain-torch reference.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from breakgraph.kernels.direct_launch import DirectLaunch, specialized
from breakgraph.kernels.launch import (
    check_rows,
    import_triton,
    launches_early,
    power_of_two,
)

GATED_BLOCK, GATED_WARPS = 1024, 4
"""Elements that a program of the gated norm holds, in whole groups, at least one; its warps.

On an H200 in bfloat16, 2048 x 8192 in groups of 1024 take 26.6 µs (3.8 TB/s), as with half the
warps; 16 rows 1.6, with twice the elements a program 1.7. In groups of 128, 16 x 4096 take 1.5 with
eight groups a program, 2.5 with sixteen in half the warps."""

tl: Any = None  # triton.language, once the kernels are made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor")
_library.define(
    "add_rms_norm(Tensor(a!) residual, Tensor x, Tensor weight, float eps, float offset) -> Tensor"
)
_library.define(
    "gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, int group_size, "
    "bool gate_first) -> Tensor"
)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * (weight + offset)`` in float32, rounded once.

    Args:
        x: ``[rows, size]``, rows strided.
        weight: ``[size]``, any floating dtype.
        eps: added to the mean of squares.
        offset: added to the weight; 1 for models that keep weights around zero.

    Returns:
        ``[rows, size]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: ``weight`` has another length, or the rows of ``x`` have gaps.
    """
    check_rows(x=x)
    _check_weight(weight, x.shape[1])
    return torch.ops.breakgraph.rms_norm(x, weight, eps, offset)


def add_rms_norm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
) -> torch.Tensor:
    """Add ``x`` to ``residual`` in place; return ``rms_norm`` of the rounded sum.

    For what no matrix product adds itself: on an H200 a product of 2048 rows and 4096 x 4096 that
    adds, and ``rms_norm``, take 98 µs, a plain one and this 103; up to 512 rows they are equal.

    Args:
        residual: ``[rows, size]``, rows strided.
        x: as ``residual``, in its dtype.
        weight: ``[size]``, any floating dtype.
        eps: added to the mean of squares.
        offset: added to the weight.

    Returns:
        ``[rows, size]``, contiguous.

    Raises:
        ValueError: shapes or dtypes differ, or the rows have gaps.
    """
    check_rows(residual=residual, x=x)
    _check_weight(weight, x.shape[1])
    if x.dtype != residual.dtype:
        raise ValueError(f"x is {x.dtype} and residual {residual.dtype}; they must be the same")
    return torch.ops.breakgraph.add_rms_norm(residual, x, weight, eps, offset)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    gate_first: bool,
) -> torch.Tensor:
    """RMS normalisation of each group of ``x``, and multiplication with ``silu(gate)``.

    With ``gate_first`` (Mamba2) the product is normalised, else (gated delta net) the normalised
    and weighted value is multiplied.

    Args:
        x: ``[rows, size]``, rows strided.
        gate: as ``x``; a view of a wider projection, say.
        weight: ``[size]``, or ``[group_size]`` for all groups; any floating dtype.
        eps: added to the mean of squares.
        group_size: consecutive elements that are normalised together.
        gate_first: whether the gate is applied before the normalisation.

    Returns:
        ``[rows, size]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: the groups do not fill a row, ``weight`` has another length, or rows have gaps.
    """
    check_rows(x=x, gate=gate)
    if group_size < 1 or x.shape[1] % group_size:
        raise ValueError(f"groups of {group_size} do not fill a row of {x.shape[1]}")
    _check_weight(weight, x.shape[1], group_size)
    return torch.ops.breakgraph.gated_rms_norm(x, gate, weight, eps, group_size, gate_first)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> torch.Tensor:
    """``rms_norm`` in plain torch ops."""
    return (_normalised(x.float(), eps) * (weight.float() + offset)).to(x.dtype)


def add_rms_norm_reference(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> torch.Tensor:
    """``add_rms_norm`` in plain torch ops."""
    return rms_norm_reference(residual.add_(x), weight, eps, offset)


def gated_rms_norm_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    gate_first: bool,
) -> torch.Tensor:
    """``gated_rms_norm`` in plain torch ops."""
    groups = x.float().unflatten(1, (-1, group_size))
    factor = F.silu(gate.float()).unflatten(1, (-1, group_size))
    if gate_first:
        groups = groups * factor
    # A weight of the rows' dtype keeps the product in that dtype; another promotes it.
    weighted = weight.view(-1, group_size) * _normalised(groups, eps).to(x.dtype)
    if not gate_first:
        weighted = weighted.float() * factor
    return weighted.to(x.dtype).flatten(1)


def _normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _check_weight(weight: torch.Tensor, *lengths: int) -> None:
    if weight.dim() != 1 or len(weight) not in lengths or not weight.is_contiguous():
        wanted = " or ".join(f"[{length}]" for length in dict.fromkeys(lengths))
        raise ValueError(f"weight has shape {list(weight.shape)}; {wanted}, contiguous, is needed")


def _row_warps(block: int) -> int:
    """Warps of a program that holds a row of ``block`` elements.

    On an H200 in bfloat16, 2048 rows of 4096 take 11.7, 11.1, 10.8 and 11.7 µs with 2, 4, 8 and
    16; 16 rows of 1024 take 1.5, 1.4 and 1.4 with 2, 4 and 8.
    """
    return max(1, min(8, block // 256), min(16, block // 512))


def _norm_rows(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> torch.Tensor:
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    block = power_of_two(size)
    other = x if added is None else added
    if out.numel():
        early = launches_early(x.device)
        _kernels().norm(
            (rows, 1, 1),
            (x, other, weight, out),
            (),
            specialized(
                (x.stride(0), other.stride(0), eps, offset, added is not None, size, block, early),
                _row_warps(block),
                early,
            ),
        )
    return out


def _rms_norm_on_cuda(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> torch.Tensor:
    return _norm_rows(x, None, weight, eps, offset)


def _add_rms_norm_on_cuda(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> torch.Tensor:
    return _norm_rows(residual, x, weight, eps, offset)


def _gated_rms_norm_on_cuda(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    gate_first: bool,
) -> torch.Tensor:
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    block, groups = power_of_two(group_size), size // group_size
    held = min(power_of_two(groups), max(1, GATED_BLOCK // block))
    if out.numel():
        one_weight, early = len(weight) == group_size, launches_early(x.device)
        _kernels().gated_norm(
            (rows, -(-groups // held), 1),
            (x, gate, weight, out),
            (),
            specialized(
                (
                    *(x.stride(0), gate.stride(0), eps, gate_first, one_weight),
                    *(groups, group_size, held, block, early),
                ),
                min(16, max(1, GATED_WARPS * held * block // GATED_BLOCK)),
                early,
            ),
        )
    return out


_library.impl("rms_norm", rms_norm_reference, "CPU")
_library.impl("rms_norm", _rms_norm_on_cuda, "CUDA")
_library.impl("add_rms_norm", add_rms_norm_reference, "CPU")
_library.impl("add_rms_norm", _add_rms_norm_on_cuda, "CUDA")
_library.impl("gated_rms_norm", gated_rms_norm_reference, "CPU")
_library.impl("gated_rms_norm", _gated_rms_norm_on_cuda, "CUDA")


class _Kernels(NamedTuple):
    norm: DirectLaunch
    gated_norm: DirectLaunch


@cache
def _kernels() -> _Kernels:
    """The Triton kernels; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit
    def norm(  # type: ignore[no-untyped-def]
        x,
        added,
        weight,
        out,
        X_ROW: tl.constexpr,
        ADDED_ROW: tl.constexpr,
        EPS: tl.constexpr,
        OFFSET: tl.constexpr,
        ADD: tl.constexpr,
        SIZE: tl.constexpr,
        BLOCK: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        row = tl.program_id(0).to(tl.int64)
        col = tl.arange(0, BLOCK)
        held = col < SIZE
        value = tl.load(x + row * X_ROW + col, mask=held, other=0.0).to(tl.float32)
        factor = tl.load(weight + col, mask=held, other=0.0).to(tl.float32) + OFFSET
        if ADD:
            value += tl.load(added + row * ADDED_ROW + col, mask=held, other=0.0).to(tl.float32)
            rounded = value.to(x.dtype.element_ty)
            tl.store(x + row * X_ROW + col, rounded, mask=held)
            value = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + EPS)
        tl.store(
            out + row * SIZE + col, (value * scale * factor).to(out.dtype.element_ty), mask=held
        )

    @triton.jit
    def gated_norm(  # type: ignore[no-untyped-def]
        x,
        gate,
        weight,
        out,
        X_ROW: tl.constexpr,
        GATE_ROW: tl.constexpr,
        EPS: tl.constexpr,
        GATE_FIRST: tl.constexpr,
        ONE_WEIGHT: tl.constexpr,
        NUM_GROUPS: tl.constexpr,
        GROUP_SIZE: tl.constexpr,
        GROUPS: tl.constexpr,
        BLOCK: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        row = tl.program_id(0).to(tl.int64)
        group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None]
        col = tl.arange(0, BLOCK)[None, :]
        held = (group < NUM_GROUPS) & (col < GROUP_SIZE)
        at = group * GROUP_SIZE + col
        value = tl.load(x + row * X_ROW + at, mask=held, other=0.0).to(tl.float32)
        wide = tl.load(gate + row * GATE_ROW + at, mask=held, other=0.0).to(tl.float32)
        if ONE_WEIGHT:
            factor = tl.load(weight + col, mask=col < GROUP_SIZE, other=0.0).to(tl.float32)
        else:
            factor = tl.load(weight + at, mask=held, other=0.0).to(tl.float32)
        active = wide / (1.0 + tl.exp(-wide))
        if GATE_FIRST:
            value = value * active
        scale = tl.rsqrt(tl.sum(value * value, 1) / GROUP_SIZE + EPS)
        value = (value * scale[:, None]).to(x.dtype.element_ty).to(tl.float32) * factor
        if not GATE_FIRST:
            if weight.dtype.element_ty == x.dtype.element_ty:
                value = value.to(x.dtype.element_ty).to(tl.float32)
            value = value * active
        to = out + row * (NUM_GROUPS * GROUP_SIZE) + at
        tl.store(to, value.to(out.dtype.element_ty), mask=held)

    return _Kernels(norm=DirectLaunch(norm), gated_norm=DirectLaunch(gated_norm))
