"""The feed-forward blocks, gated and plain."""

from __future__ import annotations

import torch
from torch import nn

from breakgraph.distributed import equal_shard
from breakgraph.layers.linear import ColumnLinear, GatedLinear, RowLinear


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up as one matrix product.

    Without ``reduces``, ``forward`` adds this rank's part of a sum that its caller began.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool = False, reduces: bool = True
    ) -> None:
        super().__init__()
        inner = equal_shard(intermediate_size, "the intermediate size")
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = GatedLinear(hidden_size, parts, bias=bias)
        alone = {"begins": reduces, "reduces": reduces}
        self.down_proj = RowLinear(inner, hidden_size, bias=bias, **alone)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, normed_eps: float | None = None
    ) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual`` in place; both ``[rows, hidden]``.

        ``normed_eps`` is what ``RMSNorm.deferred`` gave with ``x``.
        """
        return self.down_proj.add_to(residual, self.gate_up_proj(x, normed_eps))


class PlainMLP(nn.Module):
    """``down(relu(up(x))²)``, the feed-forward block of NemotronH.

    Without ``reduces``, ``forward`` adds this rank's part of a sum that its caller began.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool = False, reduces: bool = True
    ) -> None:
        super().__init__()
        inner = equal_shard(intermediate_size, "the intermediate size")
        self.up_proj = ColumnLinear(hidden_size, inner, bias=bias, activation="relu_squared")
        alone = {"begins": reduces, "reduces": reduces}
        self.down_proj = RowLinear(inner, hidden_size, bias=bias, **alone)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual`` in place; both ``[rows, hidden]``."""
        return self.down_proj.add_to(residual, self.up_proj(x))
