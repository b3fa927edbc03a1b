"""RMS normalisation of hidden states, and of a mixer's output with its gate."""

from __future__ import annotations

import torch
from torch import nn

from breakgraph.kernels.norms import gated_rms_norm, rms_norm
from breakgraph.layers.linear import weight_parameter


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * (weight + offset)`` over the last dimension, in float32."""

    def __init__(self, size: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = weight_parameter(size)
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[rows, size]``."""
        return rms_norm(x, self.weight, self.eps, self.offset)


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
