"""From hidden states to one vector, or one row of scores, a request: an eager tail.

Requests are packed, and their lengths stay on the device: nothing here loops over requests or
waits for the device.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

PoolingMode = Literal["last", "mean", "cls"]


class Pooler(nn.Module):
    """The last token, the mean of all tokens or the first token of each request.

    Raises:
        ValueError: ``mode`` is not one of those.
    """

    def __init__(self, mode: PoolingMode = "last", *, normalize: bool = True) -> None:
        super().__init__()
        if mode not in get_args(PoolingMode):
            raise ValueError(f"pooling {mode!r} is unknown; choose one of last, mean, cls")
        self.mode = mode
        self.normalize = normalize

    def forward(self, hidden_states: torch.Tensor, extend_lens: torch.Tensor) -> torch.Tensor:
        """Pool a packed batch of whole sequences.

        Args:
            hidden_states: ``[num_tokens, hidden_size]``.
            extend_lens: int32 or int64 ``[batch_size]`` on the same device, each at least 1,
                their sum ``num_tokens``.

        Returns:
            float32 ``[batch_size, hidden_size]``, of length 1 where ``normalize``.
        """
        if self.mode == "mean":
            # Sums in a fixed order, which index_add's atomics do not, and in 22 against 46 µs for
            # 64 requests of 64 x 1024 on an H200; one of 4096 x 1024 takes 258 against 64.
            pooled = torch.segment_reduce(
                hidden_states.float(), "mean", lengths=extend_lens, unsafe=True
            )
        else:
            ends = extend_lens.cumsum(0)
            rows = ends - 1 if self.mode == "last" else ends - extend_lens
            pooled = hidden_states.index_select(0, rows).float()
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


class ClassificationHead(nn.Module):
    """Scores of each request, from its last token."""

    def forward(
        self, hidden_states: torch.Tensor, score_weight: torch.Tensor, last_rows: torch.Tensor
    ) -> torch.Tensor:
        """Score a packed batch.

        Args:
            hidden_states: ``[num_tokens, hidden_size]``, after the final norm.
            score_weight: ``[num_labels, hidden_size]``.
            last_rows: int64 ``[batch_size]`` on the device, the row of each request's last token.

        Returns:
            float32 ``[batch_size, num_labels]``, before any softmax.
        """
        return F.linear(hidden_states.index_select(0, last_rows), score_weight).float()
