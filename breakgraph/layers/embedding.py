"""The token embedding."""

from __future__ import annotations

import torch
from torch import nn

from breakgraph.layers.linear import weight_parameter


class Embedding(nn.Module):
    """A table of ``weight: [vocab_size, hidden_size]``."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = weight_parameter(vocab_size, hidden_size)

    def forward(self, input_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Look up int64 ``input_ids: [rows]``; gives ``[rows, hidden_size]``, ``out`` if given."""
        return torch.index_select(self.weight, 0, input_ids, out=out)
