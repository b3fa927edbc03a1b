"""Products of a few rows with a large weight, whose time is that of reading the weight.

Equal inputs give equal bits, and all rounding is that of a torch product followed by torch's ops. A
launch may begin to read the weight while the kernel ahead of it still runs, so that kernel must not
write the weight.

Each is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU the op
is its plain-torch reference.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from breakgraph.kernels.row_factor import row_factor
from breakgraph.kernels.small_products_cuda import (
    ACTIVATIONS,
    MAX_ROWS,
    add_small_product_on_cuda,
    gains,
    small_product_on_cuda,
)

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "small_product(Tensor x, Tensor weight, str activation, float? normed_eps) -> Tensor"
)
_library.define("add_small_product(Tensor(a!) residual, Tensor x, Tensor weight, bool keep) -> ()")

Activation = Literal["none", "silu_mul", "relu_squared"]


def serves(weight: torch.Tensor, activation: Activation = "none") -> bool:
    """Whether the kernels multiply with ``weight: [out_features, in_features]``, and gain by it.

    They are for 16-bit types on CUDA, from compute capability 9 on.
    """
    return weight.is_cuda and gains(weight, activation)


def small_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation: Activation = "none",
    normed_eps: float | None = None,
) -> torch.Tensor:
    """``x @ weight.T``, activated.

    Args:
        x: ``[rows, in_features]``, rows strided and dense; on CUDA at most ``MAX_ROWS``.
        weight: ``[out_features, in_features]``, one that ``serves``.
        activation: ``"none"``; ``"relu_squared"``; or ``"silu_mul"``, where the weight has the rows
            of a gate, then those of what it gates.
        normed_eps: of the ``row_factor`` of ``x`` that the product is multiplied with before it
            is activated; None for no factor.

    Returns:
        ``[rows, out_features]``, or half of them with ``"silu_mul"``; contiguous.

    Raises:
        ValueError: there are more rows, or the activation is another.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    _check_rows(x)
    return torch.ops.breakgraph.small_product(x, weight, activation, normed_eps)


def add_small_product(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, keep: bool = True
) -> None:
    """Add ``x @ weight.T`` to ``residual`` in place, the sum rounded once.

    Args:
        residual: ``[rows, out_features]``, rows strided and dense.
        x: ``[rows, in_features]``, rows strided and dense; on CUDA at most ``MAX_ROWS``.
        weight: ``[out_features, in_features]``, one that ``serves``.
        keep: False writes the product alone, whatever ``residual`` held.

    Raises:
        ValueError: there are more rows.
    """
    _check_rows(x)
    torch.ops.breakgraph.add_small_product(residual, x, weight, keep)


def small_product_reference(
    x: torch.Tensor, weight: torch.Tensor, activation: str, normed_eps: float | None = None
) -> torch.Tensor:
    """``small_product`` in plain torch ops."""
    product = F.linear(x, weight)
    if normed_eps is not None:
        product = (product.float() * row_factor(x, normed_eps)).to(x.dtype)
    if activation == "relu_squared":
        return product.relu_().square_()
    if activation == "none":
        return product
    gate, up = product.chunk(2, dim=1)
    return F.silu(gate) * up


def add_small_product_reference(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, keep: bool
) -> None:
    """``add_small_product`` in plain torch ops."""
    residual.addmm_(x, weight.t(), beta=int(keep))


def _check_rows(x: torch.Tensor) -> None:
    if x.is_cuda and len(x) > MAX_ROWS:
        raise ValueError(f"{len(x)} rows are more than the {MAX_ROWS} of a small product")


_library.impl("small_product", small_product_reference, "CPU")
_library.impl("small_product", small_product_on_cuda, "CUDA")
_library.impl("add_small_product", add_small_product_reference, "CPU")
_library.impl("add_small_product", add_small_product_on_cuda, "CUDA")
