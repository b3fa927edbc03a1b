"""What the graph runners of both phases share: buckets, buffers, capture, replay.

All buckets are captured on one stream into one pool, the largest first, so that graph memory
is about the largest bucket's and not the sum; they share one output buffer. Prefill and decode
may share the pool too: their forwards run one after the other on one stream, a replay writes
every byte of the pool that it reads, and what outlives it (hidden states, KV cache, slot mirror)
lies outside. Tests poison the pool between any two replays of either phase.

Captures are audited: a segment that reads anything but weights, the static buffers, the KV pool
and its own tensors fails here and not at some replay.
"""

from __future__ import annotations

import gc
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from breakgraph.attention.base import AttentionBackend
from breakgraph.distributed import SINGLE, TensorParallelGroup
from breakgraph.forward import ForwardBatch, LayerInputs, forward_context
from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    CaptureAudit,
    TapePool,
    eager_on_graph,
)
from breakgraph.graph.cuda import pool_segments
from breakgraph.runner.buckets import Dispatch
from breakgraph.runner.input_buffers import FilledBatch, PrefillInputBuffers

logger = logging.getLogger(__name__)

WARM_UP_ROWS = 2048
"""Enough to set up all that larger buckets run, whose kernels are the same; 8192 of them take the
GPU 0.2 s with 8 billion weights."""


class GraphCaptureError(RuntimeError):
    """The graphs could not be captured; the cause is the first error."""


def new_pool(device: torch.device) -> Any:
    """Memory for graphs to share."""
    return TapePool() if device.type == "cpu" else torch.cuda.graph_pool_handle()


class GraphRunner(ABC):
    """Captures a layer stack once per bucket, and replays it.

    Args:
        stack: ``forward(LayerInputs) -> [rows, hidden_size]``.
        static_tensors: what segments may read besides the buffers: weights, KV pool, slot mirror.
        buffers: the static inputs.
        attn_backend: captured if it is ``capturable``, else in the breaks.
        buckets: rows of each graph, ascending.
        context_length: the longest sequence, in tokens.
        hidden_size, dtype, device: of the hidden states.
        pool: graph memory, shared by runners that are given the same.
        breaks: whether what is marked ``eager_on_graph`` breaks the graphs.
        debug: make the whole stack one break of the graph, so that its Python runs every time.
        output: ``[at least the largest bucket, hidden_size]`` for results, shared by runners that
            take turns; None makes one.
        group: the ranks that run the same forwards, each a part of the stack.

    Attributes:
        memory_bytes: what the graphs take, with what the pool has grown by for them.
        own_bytes: of each bucket, what its graph takes outside of the pool.
    """

    phase: ClassVar[str]
    unit: ClassVar[str]
    off_flag: ClassVar[str]
    memory_flags: ClassVar[str]
    _failed: ClassVar[bool] = False

    def __init__(
        self,
        stack: nn.Module,
        static_tensors: Iterable[torch.Tensor],
        *,
        buffers: PrefillInputBuffers,
        attn_backend: AttentionBackend,
        buckets: Sequence[int],
        context_length: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: Any,
        breaks: bool = True,
        debug: bool = False,
        output: torch.Tensor | None = None,
        group: TensorParallelGroup = SINGLE,
    ) -> None:
        self.buffers, self.attn_backend, self.buckets = buffers, attn_backend, tuple(buckets)
        self.pool = pool
        self.debug = debug
        self.group = group
        self._stack, self._device = stack, device
        self._context_length, self._breaks = context_length, breaks or debug
        if output is None:
            output = torch.zeros(self.buckets[-1], hidden_size, dtype=dtype, device=device)
        self._output = output
        self._audit = CaptureAudit([*static_tensors, *buffers.tensors(), self._output])
        self._outputs: dict[int, Any] = {}
        self.graphs: dict[int, BreakableCUDAGraph] = {}
        self.capture_seconds = 0.0
        self.memory_bytes = 0
        self.own_bytes: dict[int, int] = {}

    @abstractmethod
    def can_run(self, batch: ForwardBatch) -> Dispatch:
        """The bucket for ``batch``, or None with the reason."""

    @abstractmethod
    def dummy(self, bucket: int) -> ForwardBatch:
        """A batch that fills ``bucket`` and stores to the reserved slot alone."""

    def replay_prepare(self, batch: ForwardBatch, bucket: int) -> FilledBatch:
        """Bring the live batch to where the graph of ``bucket`` reads, and plan its attention."""
        filled = self.buffers.fill(batch, bucket)
        if batch.num_tokens:
            self.attn_backend.init_forward_metadata(batch, bucket)
        return filled

    def replay(self, batch: ForwardBatch, bucket: int) -> torch.Tensor:
        """Hidden states ``[num_tokens, hidden_size]`` of the prepared batch.

        They lie in one output buffer that the next replay, of whatever bucket, overwrites. With
        ``debug``, a stack's result that is no tensor comes back whole.
        """
        with forward_context(batch, self.attn_backend):
            self.graphs[bucket].replay()
        output = self._outputs[bucket]
        return output[: batch.num_tokens] if isinstance(output, torch.Tensor) else output

    @torch.no_grad()
    def capture(self) -> None:
        """Capture every bucket. Raises GraphCaptureError, naming the bucket and what helps."""
        start, taken = time.perf_counter(), self._taken_bytes()
        if self.debug:
            logger.warning(
                "--debug-cuda-graph: every %s runs eagerly inside its graph, which is slower than "
                "no graph; leave the flag out to serve",
                self.phase,
            )
        self._warm_up()
        # While the GPU is at it. All generations take 0.1 s, and only loading and a failure leave
        # anything in the oldest.
        gc.collect(2 if GraphRunner._failed or not self.pool_bytes() else 1)
        GraphRunner._failed = False
        self._empty_cache()  # a capture that runs out of memory cannot
        last = self._driver_bytes()
        description = f"capturing {self.phase} graphs"
        silent = not self.group.is_first
        ladder = tqdm(self.buckets[::-1], desc=description, unit="bucket", disable=silent)
        with self.group.capturing(), ladder as progress:
            for bucket in progress:
                progress.set_postfix_str(f"{bucket} {self.unit}s, {self._memory_text()}")
                self.graphs[bucket] = self._capture_bucket(bucket)
                own, last = last, self._driver_bytes()
                # Captured again, a graph may take what the driver kept of its first capture.
                self.own_bytes[bucket] = max(self.own_bytes.get(bucket, 0), last - own)
        self.capture_seconds = time.perf_counter() - start
        self.memory_bytes = self._taken_bytes() - taken
        largest = self.graphs[self.buckets[-1]]
        logger.info(
            "captured %d %s graphs of %d to %d %ss, %d segments and %d breaks each, in "
            "%.2f s and %.3f GB",
            len(self.buckets),
            self.phase,
            self.buckets[0],
            self.buckets[-1],
            self.unit,
            largest.num_segments,
            largest.num_breaks,
            self.capture_seconds,
            self.memory_bytes / 1e9,
        )

    def drop(self) -> None:
        """Let go of what was captured, at once: a communicator waits for graphs that use it."""
        for graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self._outputs.clear()

    def run_eagerly(self, batch: ForwardBatch) -> None:
        """The same forward without a graph, over the same buffers."""
        filled = self.replay_prepare(batch, batch.num_tokens)
        with forward_context(batch, self.attn_backend):
            self._run(filled.inputs)

    def pool_bytes(self) -> int:
        """Of the memory that the graphs, and those of other runners, share."""
        if self._device.type == "cpu":
            return int(self.pool.num_bytes)
        return sum(segment["total_size"] for segment in pool_segments(self.pool))

    def _run(self, inputs: LayerInputs) -> Any:
        self.attn_backend.begin_layers(inputs)
        return self._stack(inputs)

    @eager_on_graph()
    def _run_as_break(self, bucket: int) -> Any:
        return self._run(self.buffers.inputs(bucket))

    def _warm_up(self) -> None:
        """Launch what is captured once before, so that libraries and kernels set up outside."""
        if self._device.type == "cuda":
            for bucket in self._warm_up_buckets():
                self.run_eagerly(self.dummy(bucket))

    def _warm_up_buckets(self) -> Iterable[int]:
        many = next((rows for rows in self.buckets if rows >= WARM_UP_ROWS), self.buckets[-1])
        return {many, self.buckets[0]}

    def _capture_bucket(self, bucket: int) -> BreakableCUDAGraph:
        batch = self.dummy(bucket)
        graph = BreakableCUDAGraph()
        capture = BreakableCUDAGraphCapture(
            graph,
            self.pool,
            device=self._device,
            audit=self._audit,
            breaks=self._breaks,
            dry=True,  # with its forwards a ladder to 8192 tokens took 3.4 s on an H200, not 2.1
        )
        try:
            filled = self.replay_prepare(batch, bucket)
            with forward_context(batch, self.attn_backend), capture:
                result = self._run_as_break(bucket) if self.debug else self._run(filled.inputs)
                if isinstance(result, torch.Tensor):
                    result = self._output[:bucket].copy_(result)
                elif not self.debug:
                    raise TypeError(
                        f"the layer stack gave a {type(result).__name__}; hidden states, one "
                        "tensor, are what can be captured"
                    )
        except Exception as error:
            self.drop()
            GraphRunner._failed = True
            help_ = f"run {self.off_flag} until the cause is mended"
            if isinstance(error, torch.OutOfMemoryError):
                help_ = f"lower --mem-fraction-static, or {self.memory_flags}"
            raise GraphCaptureError(
                f"capturing the {bucket}-{self.unit} {self.phase} graph failed in segment "
                f"{capture.num_segments}: {type(error).__name__}: {error} ({help_})"
            ) from error
        self._outputs[bucket] = result
        return graph

    def _taken_bytes(self) -> int:
        if self._device.type == "cpu":
            return int(self.pool.num_bytes)
        self._empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _driver_bytes(self) -> int:
        """Taken, but not by torch's allocator, whose cache a bucket may leave as it is."""
        if self._device.type == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)  # flat, it takes 0.3 ms more
        return int(total - free - stats["reserved_bytes"]["all"]["current"])

    def _memory_text(self) -> str:
        if self._device.type == "cpu":
            return f"{self.pool.num_bytes / 1e9:.2f} GB taken"
        return f"{torch.cuda.mem_get_info(self._device)[0] / 1e9:.1f} GB free"
