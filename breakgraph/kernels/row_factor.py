"""What a norm leaves to do where its weight is part of the matrix product behind it.

``rms_norm(x) @ W.T`` is ``row_factor(x) * (x @ (W * weight).T)``: one number a row, which whatever
reads the product multiplies. So no kernel has to write the normalised rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from breakgraph.kernels.launch import import_triton

tl: Any = None  # triton.language, once the function is made


def row_factor(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / sqrt(mean(x²) + eps)`` of ``x: [rows, size]``, float32 ``[rows, 1]``."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


@cache
def row_factor_function() -> Any:
    """``row_factor`` of one row for Triton kernels to call."""
    global tl
    triton, tl = import_triton()

    @triton.jit
    def factor(x, EPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        col = tl.arange(0, BLOCK)
        value = tl.load(x + col, mask=col < SIZE, other=0.0).to(tl.float32)
        return tl.rsqrt(tl.sum(value * value, 0) / SIZE + EPS)

    return factor
