"""From hidden states to logits and log-probabilities: an eager tail, outside every graph.

Only here does the number of requests give a tensor its shape. Log-probabilities of all rows are
computed a block of rows at a time, so memory is bounded by the block, not by the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from breakgraph.distributed import SINGLE, TensorParallelGroup
from breakgraph.kernels.gather import gather_rows

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LogitsOutput:
    """What a causal LM's prefill gives.

    Attributes:
        next_token_logits: float32 ``[batch_size, vocab_size]``.
        input_token_logprobs: float32 ``[num_tokens]``, NaN where no target was given; None if
            no log-probabilities were asked for.
    """

    next_token_logits: torch.Tensor
    input_token_logprobs: torch.Tensor | None = None


class LogitsProcessor(nn.Module):
    """Logits of each request's last token and, on request, each row's target log-probability.

    ``chunk_rows`` bounds how many rows have logits at one time: at 512 rows a vocabulary of
    150,000 takes 0.3 GB in float32, and its softmax as much again. With ``group``, each rank's
    weight has the logits of some of ``vocab_size`` tokens, and every rank gets those of all.
    """

    def __init__(
        self,
        chunk_rows: int = 512,
        *,
        group: TensorParallelGroup = SINGLE,
        vocab_size: int = 0,
    ) -> None:
        super().__init__()
        self.chunk_rows = chunk_rows
        self._group, self._vocab_size = group, vocab_size

    def forward(
        self,
        hidden_states: torch.Tensor,
        lm_head_weight: torch.Tensor | Head,
        last_rows: torch.Tensor,
        logprob_targets: torch.Tensor | None = None,
    ) -> LogitsOutput:
        """Compute logits.

        Args:
            hidden_states: ``[num_tokens, hidden_size]``, after the final norm.
            lm_head_weight: ``[vocab_size, hidden_size]``, or this rank's share of it, or a function
                that makes logits of rows of hidden states.
            last_rows: int64 ``[batch_size]`` on the device, the row of each request's last token.
            logprob_targets: int64 ``[num_tokens]`` on the device, the token whose
                log-probability each row is asked for, -1 for none.
        """
        last = gather_rows(hidden_states, last_rows)
        logprobs = None
        if logprob_targets is not None:
            logprobs = self.target_logprobs(hidden_states, lm_head_weight, logprob_targets)
        return LogitsOutput(self.logits(last, lm_head_weight), logprobs)

    def logits(
        self, hidden_states: torch.Tensor, lm_head_weight: torch.Tensor | Head
    ) -> torch.Tensor:
        """float32 ``[rows, vocab_size]`` of ``hidden_states: [rows, hidden_size]``."""
        if not isinstance(lm_head_weight, torch.Tensor):
            return lm_head_weight(hidden_states).float()
        logits = F.linear(hidden_states, lm_head_weight)
        return self._group.gather_columns(logits, self._vocab_size).float()

    def target_logprobs(
        self,
        hidden_states: torch.Tensor,
        lm_head_weight: torch.Tensor | Head,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """float32 ``[rows]``: the log-probability of each row's target, NaN where it is -1."""
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden_states.device)
        for rows, wanted, out in zip(
            hidden_states.split(self.chunk_rows),
            targets.split(self.chunk_rows),
            logprobs.split(self.chunk_rows),
            strict=True,
        ):
            logits = self.logits(rows, lm_head_weight)
            loss = F.cross_entropy(logits, wanted, ignore_index=-1, reduction="none")
            torch.neg(loss, out=out)
        return logprobs.masked_fill_(targets < 0, float("nan"))
