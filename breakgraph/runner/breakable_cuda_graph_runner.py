"""Prefill as breakable graphs: one per token bucket, attention as eager breaks.

Which batches replay is decided by the ladder, the padding limit and, where measured, by what a
forward costs eagerly and replayed: no length of any request enters, only the count of tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from breakgraph.forward import ForwardBatch
from breakgraph.runner.buckets import Dispatch, DispatchReason, decide
from breakgraph.runner.costs import PrefillCosts, anchors
from breakgraph.runner.graph_runner import GraphRunner

logger = logging.getLogger(__name__)


class BreakableCudaGraphRunner(GraphRunner):
    """Replays prefills of any shape that fit one of the token buckets.

    Args:
        max_padding: the most rows computed per token, see ``decide``.
        how: as for ``GraphRunner``.

    Attributes:
        out_of_service: buckets that were found to give wrong results.
    """

    phase, unit = "prefill", "token"
    off_flag = "without --enable-breakable-cuda-graph"
    memory_flags = "the largest bucket with --piecewise-cuda-graph-tokens or --chunked-prefill-size"

    def __init__(self, *args: Any, max_padding: float, **how: Any) -> None:
        super().__init__(*args, **how)
        self.max_padding = max_padding
        self.costs: PrefillCosts | None = None
        self.out_of_service: set[int] = set()

    def can_run(self, batch: ForwardBatch) -> Dispatch:
        tokens = batch.num_tokens
        dispatch = decide(tokens, self.buckets, self.max_padding, self.costs)
        if dispatch.bucket in self.out_of_service:
            reason = DispatchReason.OUT_OF_SERVICE
            return Dispatch(None, reason, tokens, refused=dispatch.bucket)
        return dispatch

    def retire(self, bucket: int) -> None:
        """Take a bucket out of service: what it would have replayed runs eagerly."""
        self.out_of_service.add(bucket)

    def dummy(self, bucket: int) -> ForwardBatch:
        return ForwardBatch.dummy(bucket, self._context_length)

    @torch.no_grad()
    def measure(self) -> None:
        """Time eager forwards and replays, for ``can_run`` to choose by."""
        start, tokens = time.perf_counter(), anchors(self.buckets)
        batches = [self.dummy(count) for count in tokens]
        self.costs = PrefillCosts(
            tokens=tuple(tokens),
            eager_ms=self._times(self.run_eagerly, batches),
            replay_ms=self._times(self._replay_whole, batches),
        )
        logger.info(
            "measured eager and replayed prefills in %.2f s: %s",
            time.perf_counter() - start,
            ", ".join(
                f"{n} tokens {eager:.2f} and {replay:.2f} ms"
                for n, eager, replay in zip(
                    tokens, self.costs.eager_ms, self.costs.replay_ms, strict=True
                )
            ),
        )

    def _times(
        self, run: Callable[[ForwardBatch], object], batches: list[ForwardBatch]
    ) -> tuple[float, ...]:
        """Milliseconds of each, of several ranks the first one's: all must decide alike."""
        return self.group.shared_floats([self._time(run, batch) for batch in batches])

    def _time(self, run: Callable[[ForwardBatch], object], batch: ForwardBatch) -> float:
        """Milliseconds of a forward, by wall clock; the best of three where they are short."""
        best = float("inf")
        for _ in range(3 if batch.num_tokens <= 1024 else 1):
            self._synchronize()
            start = time.perf_counter()
            run(batch)
            self._synchronize()
            best = min(best, time.perf_counter() - start)
        return best * 1e3

    def _replay_whole(self, batch: ForwardBatch) -> None:
        self.replay_prepare(batch, batch.num_tokens)
        self.replay(batch, batch.num_tokens)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
