"""RMS normalisation of hidden states, and of a mixer's output with its gate."""

from __future__ import annotations

import sys

import torch
from torch import nn

from breakgraph.kernels.norms import gated_rms_norm, rms_norm
from breakgraph.layers.linear import Linear, weight_parameter

DEFERRED_ROWS = 1024
"""Rows up to which a folded norm is left to the kernels behind its product, which saves a launch;
of more they would read the rows again for as long as the norm takes."""


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * (weight + offset)`` over the last dimension, in float32.

    Attributes:
        folded: whether the weight is part of the product behind it, and here it is 1.
    """

    folded = False

    def __init__(self, size: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = weight_parameter(size)
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[rows, size]``."""
        return rms_norm(x, self.weight, self.eps, self.offset)

    def deferred(
        self, x: torch.Tensor, below: int = sys.maxsize
    ) -> tuple[torch.Tensor, float | None]:
        """``forward(x)`` and None; or, where that is less work, ``x`` as it is and the eps of the
        ``row_factor`` that the product of ``x`` has to be multiplied with.

        The latter for fewer rows than ``below``, from where on a product does without.
        """
        if self.folded and len(x) <= DEFERRED_ROWS and len(x) < below:
            return x, self.eps
        return self(x), None

    def fold_into(self, product: Linear) -> None:
        """Make the weight part of ``product``, which alone reads what this norm gives.

        A product with a bias stays as it is, and one in float16, which might overflow.
        """
        weight = product.weight
        if self.folded or product.bias is not None or weight.dtype == torch.float16:
            return
        weight.mul_(self.weight.float() + self.offset)
        product.normed_eps = self.eps
        self.weight.fill_(1.0 - self.offset)
        self.folded = True


def fold_norms(model: nn.Module) -> None:
    """Fold the norms of those layers of ``model`` that have a ``fold_norms`` of their own."""
    for module in model.modules():
        fold = getattr(module, "fold_norms", None)
        if callable(fold):
            fold()


class GatedRMSNorm(nn.Module):
    """A norm over groups of ``group_size``, and a gate, in float32.

    ``norm(x * silu(gate)) * weight`` with ``gate_first``, else ``norm(x) * weight * silu(gate)``.
    """

    def __init__(self, size: int, group_size: int, eps: float, *, gate_first: bool = True) -> None:
        super().__init__()
        self.weight = weight_parameter(size)
        self.group_size, self.eps, self.gate_first = group_size, eps, gate_first

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Of ``[rows, features]`` both; ``gate`` may be part of a wider product."""
        return gated_rms_norm(x, gate, self.weight, self.eps, self.group_size, self.gate_first)
