"""What every prefill graph runner shares: buckets, buffers, the decision, the preparation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from breakgraph.attention.base import AttentionBackend
from breakgraph.forward import ForwardBatch
from breakgraph.runner.buckets import Dispatch, decide
from breakgraph.runner.costs import PrefillCosts
from breakgraph.runner.input_buffers import FilledBatch, PrefillInputBuffers


class PrefillGraphRunner(ABC):
    """Replays a layer stack for batches of any shape that fit one of its token buckets."""

    def __init__(
        self,
        *,
        buffers: PrefillInputBuffers,
        attn_backend: AttentionBackend,
        buckets: Sequence[int],
        max_padding: float,
    ) -> None:
        self.buffers = buffers
        self.attn_backend = attn_backend
        self.buckets = tuple(buckets)
        self.max_padding = max_padding
        self.costs: PrefillCosts | None = None

    def can_run(self, batch: ForwardBatch) -> Dispatch:
        """The bucket for ``batch``, or None with the reason."""
        return decide(batch.num_tokens, self.buckets, self.max_padding, self.costs)

    def replay_prepare(self, batch: ForwardBatch, bucket: int) -> FilledBatch:
        """Bring the live batch to where the graph of ``bucket`` reads, and plan its breaks."""
        filled = self.buffers.fill(batch, bucket)
        self.attn_backend.init_forward_metadata(batch)
        return filled

    @abstractmethod
    def measure(self) -> None:
        """Time eager forwards and replays, for ``can_run`` to choose by."""

    @abstractmethod
    def capture(self) -> None:
        """Capture every bucket. Raises GraphCaptureError, naming the bucket and what helps."""

    @abstractmethod
    def replay(self, batch: ForwardBatch, bucket: int) -> torch.Tensor:
        """Hidden states ``[num_tokens, hidden_size]`` of the prepared batch.

        They lie in one output buffer that the next replay, of whatever bucket, overwrites.
        """
