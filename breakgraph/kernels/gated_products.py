"""``silu(gate) * up`` of a matrix product with many rows, at the product's end.

The product of a gate and what it gates is the widest matrix of a layer; here it is never written.
Rounding is that of a torch product followed by ``silu_mul``.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU the op is
its plain-torch reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from breakgraph.kernels.gated_products_cuda import gated_product_on_cuda, takes
from breakgraph.kernels.launch import check_rows
from breakgraph.kernels.pointwise import silu_mul_reference

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define("gated_product(Tensor x, Tensor weight) -> Tensor")


def serves_gated(weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies with ``weight: [2 * features, in_features]``.

    It is for bfloat16 on devices of compute capability 9.0, where CUDA's run-time compiler is, and
    for sizes that are multiples of 8.
    """
    return weight.is_cuda and takes(weight)


def gated_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``.

    Args:
        x: ``[rows, in_features]``, rows strided and dense.
        weight: ``[2 * features, in_features]``, one that ``serves_gated``: the gate's rows, then
            those of what it gates.

    Returns:
        ``[rows, features]``, contiguous.

    Raises:
        ValueError: ``x`` has another layout.
    """
    check_rows(x=x)
    return torch.ops.breakgraph.gated_product(x, weight)


def gated_product_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``gated_product`` in plain torch ops."""
    return silu_mul_reference(F.linear(x, weight))


_library.impl("gated_product", gated_product_reference, "CPU")
_library.impl("gated_product", gated_product_on_cuda, "CUDA")
