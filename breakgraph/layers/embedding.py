"""The token embedding."""

from __future__ import annotations

import torch
from torch import nn

from breakgraph.distributed import current_group, vocabulary_shard
from breakgraph.kernels.gather import gather_rows
from breakgraph.layers.linear import CheckpointSlot, row_slot, weight_parameter


class Embedding(nn.Module):
    """A table of ``weight: [vocab_size, hidden_size]``, of which each rank has some tokens.

    Ranks have equally many rows; what those behind the last token hold has no meaning.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._group = current_group()
        self._shard, rows = vocabulary_shard(vocab_size)
        self.weight = weight_parameter(rows, hidden_size)

    def forward(self, input_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Look up int64 ``input_ids: [rows]``; gives ``[rows, hidden_size]``, ``out`` if given."""
        if self._group.size == 1:
            return gather_rows(self.weight, input_ids, out=out)
        elsewhere = (input_ids < self._shard.begin) | (input_ids >= self._shard.end)
        local = (input_ids - self._shard.begin).masked_fill_(elsewhere, 0)
        found = gather_rows(self.weight, local, out=out)
        return self._group.all_reduce_(found.masked_fill_(elsewhere.unsqueeze(1), 0))

    def checkpoint_slot(self, name: str, tensor: torch.Tensor) -> CheckpointSlot:
        """Where this rank's part of the weight comes from."""
        return row_slot(tensor, self._shard)
