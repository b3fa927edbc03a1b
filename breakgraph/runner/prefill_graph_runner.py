"""Prefill as graphs, one per token bucket; what runs as a break is the subclass's to say.

Which batches replay is decided by the ladder, the padding limit, what the attention backend can
hold and, where measured, by what a forward costs eagerly and replayed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from breakgraph.attention import AttentionBackend
from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.runner.buckets import Dispatch, DispatchReason, bucket_for, decide
from breakgraph.runner.costs import PrefillCosts
from breakgraph.runner.graph_runner import GraphRunner


class PrefillGraphRunner(GraphRunner):
    """Replays prefills that fit one of the token buckets.

    Args:
        max_padding: the most rows computed per token, see ``decide``.
        eager_backend: plans forwards without a graph; None for ``attn_backend``.
        how: as for ``GraphRunner``.

    Attributes:
        kind: what its graphs are called.
        ladder: the buckets that were asked for, of which ``buckets`` are left.
        dropped: why the others are gone.
        costs: what forwards take; None where that is not measured.
        out_of_service: buckets that were found to give wrong results.
    """

    kind: ClassVar[str]
    phase, unit = "prefill", "token"
    off_flag = "without --enable-breakable-cuda-graph"
    memory_flags = "the largest bucket with --piecewise-cuda-graph-tokens or --chunked-prefill-size"

    def __init__(
        self,
        *args: Any,
        max_padding: float,
        eager_backend: AttentionBackend | None = None,
        **how: Any,
    ) -> None:
        super().__init__(*args, **how)
        self.max_padding = max_padding
        self.ladder = self.buckets
        self.dropped: dict[int, DispatchReason] = {}
        self.costs: PrefillCosts | None = None
        self.out_of_service: set[int] = set()
        self._eager_backend = eager_backend or self.attn_backend

    def can_run(self, batch: ForwardBatch) -> Dispatch:
        tokens, requests = batch.num_tokens, batch.batch_size
        if (refused := self.refuses(batch)) is not None:
            return self._refusal(refused, batch, self.attn_backend.max_requests)
        dispatch = decide(
            tokens, self.buckets, self.max_padding, self.costs, requests, kind=self.kind
        )
        if dispatch.bucket in self.out_of_service:
            return self._refusal(DispatchReason.OUT_OF_SERVICE, batch, dispatch.bucket)
        if dispatch.bucket is None and self.dropped:
            meant = bucket_for(self.ladder, tokens)
            if meant in self.dropped:
                return self._refusal(self.dropped[meant], batch, meant)
        return dispatch

    def refuses(self, batch: ForwardBatch) -> DispatchReason | None:
        """Why none of these graphs serves ``batch``, whatever its tokens; None where some may."""
        refused = self.attn_backend.refuses(batch)
        return None if refused is None else DispatchReason(refused)

    def expected_ms(self, dispatch: Dispatch, batch: ForwardBatch) -> float:
        """What the replay that was decided for should take; 0 where that was not measured."""
        if self.costs is None or dispatch.bucket is None:
            return 0.0
        return self.costs.replay.at(dispatch.bucket, batch.batch_size, batch.num_tokens)

    def retire(self, bucket: int) -> None:
        """Take a bucket out of service: what it would have replayed runs otherwise."""
        self.out_of_service.add(bucket)

    def drop_bucket(self, bucket: int, reason: DispatchReason) -> None:
        """Let go of a graph; a larger one serves its batches, or none does."""
        self.dropped[bucket] = reason
        self.buckets = tuple(other for other in self.buckets if other != bucket)
        del self._outputs[bucket]
        self.graphs.pop(bucket).reset()
        self.memory_bytes -= self.own_bytes.pop(bucket)

    def dummy(self, bucket: int, requests: int = 1) -> ForwardBatch:
        """As many requests as given, or as are needed to fill ``bucket``."""
        return ForwardBatch.dummy(bucket, self._context_length, requests)

    @torch.no_grad()
    def run_without_graph(self, batch: ForwardBatch) -> None:
        """The forward that a batch takes which no graph serves."""
        backend = self._eager_backend
        inputs = self.buffers.fill(batch, batch.num_tokens).inputs
        backend.init_forward_metadata(batch)
        with forward_context(batch, backend):
            backend.begin_layers(inputs)
            self._stack(inputs)

    def _refusal(self, reason: DispatchReason, batch: ForwardBatch, by: int | None) -> Dispatch:
        return Dispatch(None, reason, batch.num_tokens, refused=by, kind=self.kind)
