"""Prefill as breakable graphs: one per token bucket, attention as eager breaks.

All buckets are captured on one stream into one pool, the largest first, so that graph memory
is about the largest bucket's and not the sum; they share one output buffer. Their captures
are audited: a segment that reads anything but weights, the static buffers, the KV pool and
its own tensors fails here and not at some replay.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from breakgraph.attention.base import AttentionBackend
from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture, CaptureAudit, TapePool
from breakgraph.runner.costs import PrefillCosts, anchors
from breakgraph.runner.input_buffers import PrefillInputBuffers
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner

logger = logging.getLogger(__name__)


class GraphCaptureError(RuntimeError):
    """The graphs could not be captured; the cause is the first error."""


class BreakableCudaGraphRunner(PrefillGraphRunner):
    """Captures and replays a layer stack.

    Args:
        stack: ``forward(LayerInputs) -> [rows, hidden_size]``, attention marked as breaks.
        static_tensors: what segments may read besides the buffers: weights and the KV pool.
        buffers, attn_backend, buckets, max_padding: as for ``PrefillGraphRunner``.
        context_length: the longest sequence, in tokens.
        hidden_size, dtype, device: of the hidden states.
    """

    def __init__(
        self,
        stack: nn.Module,
        static_tensors: Iterable[torch.Tensor],
        *,
        buffers: PrefillInputBuffers,
        attn_backend: AttentionBackend,
        buckets: Sequence[int],
        max_padding: float,
        context_length: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(
            buffers=buffers, attn_backend=attn_backend, buckets=buckets, max_padding=max_padding
        )
        self._stack, self._device = stack, device
        self._context_length = context_length
        self._output = torch.zeros(self.buckets[-1], hidden_size, dtype=dtype, device=device)
        self._audit = CaptureAudit([*static_tensors, *buffers.tensors(), self._output])
        self.pool: Any = TapePool() if device.type == "cpu" else torch.cuda.graph_pool_handle()
        self.graphs: dict[int, BreakableCUDAGraph] = {}
        self.capture_seconds = 0.0
        self.memory_bytes = 0

    @torch.no_grad()
    def capture(self) -> None:
        start, free = time.perf_counter(), self._free_bytes()
        self._warm_up()
        gc.collect()
        with tqdm(self.buckets[::-1], desc="capturing prefill graphs", unit="bucket") as progress:
            for bucket in progress:
                progress.set_postfix_str(f"{bucket} tokens, {self._free_text()}")
                self.graphs[bucket] = self._capture_bucket(bucket)
        self.capture_seconds = time.perf_counter() - start
        self.memory_bytes = (
            self.pool.num_bytes if self._device.type == "cpu" else free - self._free_bytes()
        )
        largest = self.graphs[self.buckets[-1]]
        logger.info(
            "captured %d prefill graphs of %d to %d tokens, %d segments and %d breaks each, in "
            "%.2f s and %.3f GB",
            len(self.buckets),
            self.buckets[0],
            self.buckets[-1],
            largest.num_segments,
            largest.num_breaks,
            self.capture_seconds,
            self.memory_bytes / 1e9,
        )

    @torch.no_grad()
    def measure(self) -> None:
        start, tokens = time.perf_counter(), anchors(self.buckets)
        batches = [ForwardBatch.dummy(count, self._context_length) for count in tokens]
        self.costs = PrefillCosts(
            tokens=tuple(tokens),
            eager_ms=tuple(self._time(self._eager, batch) for batch in batches),
            replay_ms=tuple(self._time(self._replay_whole, batch) for batch in batches),
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

    def _eager(self, batch: ForwardBatch) -> None:
        filled = self.replay_prepare(batch, batch.num_tokens)
        with forward_context(batch, self.attn_backend):
            self._stack(filled.inputs)

    def _replay_whole(self, batch: ForwardBatch) -> None:
        self.replay_prepare(batch, batch.num_tokens)
        self.replay(batch, batch.num_tokens)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _warm_up(self) -> None:
        """Run both ends of the ladder, so that libraries set up before any capture."""
        if self._device.type == "cuda":
            for bucket in {self.buckets[-1], self.buckets[0]}:
                self._eager(ForwardBatch.dummy(bucket, self._context_length))
            self._synchronize()

    def _capture_bucket(self, bucket: int) -> BreakableCUDAGraph:
        batch = ForwardBatch.dummy(bucket, self._context_length)
        graph = BreakableCUDAGraph()
        capture = BreakableCUDAGraphCapture(
            graph, self.pool, device=self._device, audit=self._audit
        )
        try:
            filled = self.replay_prepare(batch, bucket)
            with forward_context(batch, self.attn_backend), capture:
                self._output[:bucket].copy_(self._stack(filled.inputs))
        except Exception as error:
            self.graphs.clear()
            help_ = "run without --enable-breakable-cuda-graph until the cause is mended"
            if isinstance(error, torch.OutOfMemoryError):
                help_ = (
                    "lower --mem-fraction-static, or the largest bucket with "
                    "--piecewise-cuda-graph-tokens or --chunked-prefill-size"
                )
            raise GraphCaptureError(
                f"capturing the {bucket}-token prefill graph failed in segment "
                f"{capture.num_segments}: {type(error).__name__}: {error} ({help_})"
            ) from error
        return graph

    def replay(self, batch: ForwardBatch, bucket: int) -> torch.Tensor:
        with forward_context(batch, self.attn_backend):
            self.graphs[bucket].replay()
        return self._output[: batch.num_tokens]

    def _free_bytes(self) -> int:
        if self._device.type == "cpu":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def _free_text(self) -> str:
        if self._device.type == "cpu":
            return f"{self.pool.num_bytes / 1e9:.2f} GB taken"
        return f"{torch.cuda.mem_get_info(self._device)[0] / 1e9:.1f} GB free"
