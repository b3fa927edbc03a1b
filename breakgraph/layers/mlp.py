"""The feed-forward blocks, gated and plain."""

from __future__ import annotations

import torch
from torch import nn

from breakgraph.kernels.pointwise import relu_squared_, silu_mul
from breakgraph.layers.linear import Linear, PackedLinear


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up as one matrix product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = PackedLinear(hidden_size, parts, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual`` in place; both ``[rows, hidden]``."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=1)
        return self.down_proj.add_to(residual, silu_mul(gate, up))


class PlainMLP(nn.Module):
    """``down(relu(up(x))²)``, the feed-forward block of NemotronH."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual`` in place; both ``[rows, hidden]``."""
        return self.down_proj.add_to(residual, relu_squared_(self.up_proj(x)))
