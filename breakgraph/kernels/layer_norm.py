"""Layer normalisation of rows, alone or of the sum of two.

The sum is rounded to the rows' dtype first, as torch's addition rounds it; the rest is computed in
float32 and rounded once, as torch's layer norm does. Weights may have another dtype than the rows.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU the op is
its plain-torch reference.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from breakgraph.kernels.direct_launch import DirectLaunch, specialized
from breakgraph.kernels.launch import check_rows, import_triton, launches_early, power_of_two

tl: Any = None  # triton.language, once the kernel is made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps) -> Tensor"
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``; with ``residual``, of the sum.

    The sum itself is not kept: what follows such a norm goes on from the norm.

    Args:
        x: ``[rows, size]``, rows strided.
        weight: ``[size]``, any floating dtype.
        bias: as ``weight``; None for none.
        eps: added to the variance, which is that of the row and not an estimate.
        residual: as ``x``, in its dtype; None for none.

    Returns:
        ``[rows, size]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: shapes or dtypes differ, or the rows have gaps.
    """
    if residual is None:
        check_rows(x=x)
    else:
        check_rows(x=x, residual=residual)
        if x.dtype != residual.dtype:
            raise ValueError(f"x is {x.dtype} and residual {residual.dtype}; they must be the same")
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and (one.shape != x.shape[1:] or not one.is_contiguous()):
            wanted = f"[{x.shape[1]}], contiguous, is needed"
            raise ValueError(f"{name} has shape {list(one.shape)}; {wanted}")
    return torch.ops.breakgraph.layer_norm(x, residual, weight, bias, eps)


def layer_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """``layer_norm`` in plain torch ops."""
    total = x if residual is None else x + residual
    shift = None if bias is None else bias.float()
    normed = F.layer_norm(total.float(), x.shape[1:], weight.float(), shift, eps)
    return normed.to(x.dtype)


def _layer_norm_on_cuda(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    block = power_of_two(size)
    added = x if residual is None else residual
    if out.numel():
        early = launches_early(x.device)
        _kernel()(
            (rows, 1, 1),
            (x, added, weight, weight if bias is None else bias, out),
            (),
            specialized(
                (
                    *(x.stride(0), added.stride(0), eps, residual is not None, bias is not None),
                    *(size, block, early),
                ),
                max(1, min(8, block // 256), min(16, block // 512)),  # as ``rms_norm``
                early,
            ),
        )
    return out


_library.impl("layer_norm", layer_norm_reference, "CPU")
_library.impl("layer_norm", _layer_norm_on_cuda, "CUDA")


@cache
def _kernel() -> DirectLaunch:
    """The Triton kernel; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit
    def norm(  # type: ignore[no-untyped-def]
        x,
        added,
        weight,
        bias,
        out,
        X_ROW: tl.constexpr,
        ADDED_ROW: tl.constexpr,
        EPS: tl.constexpr,
        ADD: tl.constexpr,
        SHIFT: tl.constexpr,
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
        factor = tl.load(weight + col, mask=held, other=0.0).to(tl.float32)
        if SHIFT:
            shift = tl.load(bias + col, mask=held, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(added + row * ADDED_ROW + col, mask=held, other=0.0).to(tl.float32)
            value = value.to(x.dtype.element_ty).to(tl.float32)
        centred = tl.where(held, value - tl.sum(value, 0) / SIZE, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / SIZE + EPS)
        value = centred * scale * factor
        if SHIFT:
            value += shift
        tl.store(out + row * SIZE + col, value.to(out.dtype.element_ty), mask=held)

    return DirectLaunch(norm)
