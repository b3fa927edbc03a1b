"""How much each rank has to do in a forward of ranks that hold different requests.

Every rank has the same counts before the forward. So whatever is decided from them alone, the
bucket before all, is decided alike everywhere, whether a rank has rows of its own or none. Ranks
that hold the same requests, one of the groups of --dp-size, are one rank here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from breakgraph.forward.forward_batch import ForwardBatch, ForwardMode


@dataclass(frozen=True, slots=True)
class RankCounts:
    """What the ranks bring to one forward, rank after rank; 0 for one that is idle.

    Attributes:
        mode: of the forward, on all ranks.
        tokens: new tokens.
        requests: requests, of which each has at least one of the tokens.
        with_logprobs: whether log-probabilities of prompts are wanted, on any rank.
    """

    mode: ForwardMode
    tokens: tuple[int, ...]
    requests: tuple[int, ...]
    with_logprobs: bool = False

    @classmethod
    def of(cls, batches: Sequence[ForwardBatch]) -> RankCounts:
        """Of the batches of all ranks, which have one mode."""
        return cls(
            batches[0].mode,
            tuple(batch.num_tokens for batch in batches),
            tuple(batch.batch_size for batch in batches),
            any(batch.logprob_targets is not None for batch in batches),
        )

    @property
    def rows(self) -> int:
        """Rows of every rank where none is replayed: the most tokens of any."""
        return max(self.tokens)

    def widest(self) -> ForwardBatch:
        """A batch of as many tokens and requests as any rank has: how it would run, all run."""
        zeros = np.zeros(self.rows, np.int64)
        lens = np.ones(max(self.requests), np.int32)
        lens[:1] += self.rows - len(lens)
        return ForwardBatch(
            input_ids=zeros,
            out_cache_loc=zeros,
            extend_lens=lens,
            prefix_lens=np.zeros_like(lens),
            prefix_slots=zeros[:0],
            mode=self.mode,
            rows=np.zeros(len(lens), np.int64),
        )
