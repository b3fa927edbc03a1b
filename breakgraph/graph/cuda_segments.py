"""Segments on a GPU: one ``torch.cuda.CUDAGraph`` each, all in one pool."""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch

from breakgraph.graph.callsite import call_site
from breakgraph.graph.cuda import (
    ForkWatch,
    StreamCapture,
    kernel_names,
    pool_segments,
    release_failed,
)
from breakgraph.graph.errors import BreakableGraphError, UnjoinedStreamError
from breakgraph.graph.segments import tensor_at

if TYPE_CHECKING:
    from breakgraph.graph.provenance import Ownership


class CudaSegment:
    """A CUDA graph of at least one node, instantiated."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        num_nodes: int,
        asked_bytes: int = 0,
        grown_bytes: int = 0,
    ) -> None:
        self.replay: Callable[[], Any] = graph.replay
        self.num_nodes = num_nodes
        self.asked_bytes, self.grown_bytes = asked_bytes, grown_bytes
        self._graph = graph

    def node_names(self) -> list[str]:
        return kernel_names(self._graph) if self.num_nodes else []

    def reset(self) -> None:
        self.replay = lambda: None
        self._graph.reset()


class CudaBackend:
    """Segments on a GPU: one ``torch.cuda.CUDAGraph`` each, all in one pool."""

    allows_random = True

    def __init__(
        self,
        device: torch.device,
        pool: Any,
        stream: torch.cuda.Stream | None,
        capture_error_mode: str,
        *,
        dry: bool,
    ) -> None:
        self._device, self._dry = device, dry
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._stream = stream if stream is not None else default_capture_stream(device)
        self._mode = capture_error_mode
        self._capture = StreamCapture(self._stream)
        self._watch = ForkWatch(self._stream)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ranges: list[tuple[int, int]] = []
        self._asked = self._grown = self._pool_bytes = 0

    def enter(self, stack: ExitStack) -> None:
        stack.enter_context(torch.cuda.device(self._device))
        if torch.cuda.is_current_stream_capturing():
            raise BreakableGraphError("the current stream is under capture; captures do not nest")
        outer = torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        stack.callback(outer.wait_stream, self._stream)
        stack.enter_context(torch.cuda.stream(self._stream))
        stack.enter_context(self._watch)
        self._look_at_pool()
        self._grown = 0  # what earlier graphs took of a shared pool is not this one's
        torch.cuda.current_blas_handle()  # cuBLAS cannot make one, or its workspace, in a capture

    def begin(self) -> None:
        self._watch.forks.clear()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            graph.capture_begin(pool=self.pool, capture_error_mode=self._mode)
        except RuntimeError as error:
            self._clean_up(graph, began=False)
            raise BreakableGraphError(
                f"no capture can begin in the memory pool {self.pool}: {error} A pool ends with "
                "the last graph in it; after that take a new torch.cuda.graph_pool_handle()."
            ) from error
        self._graph = graph

    def end(self) -> CudaSegment:
        graph, num_nodes = self._graph, self._capture.num_nodes()
        if graph is None or num_nodes is None:
            raise BreakableGraphError(
                "the stream capture of this segment was invalidated by an earlier CUDA error that "
                "the captured code swallowed"
            )
        if self._watch.forks:
            self._capture.check_joined(self._watch.forks)
        if num_nodes:
            graph.capture_end()  # which has nothing to warn of
        else:
            _end_capture(graph)
        self._graph = None
        if not num_nodes:  # left out of the graph: the next segment counts its memory
            return CudaSegment(graph, 0)
        segment = CudaSegment(graph, num_nodes, self._asked, self._grown)
        self._asked = self._grown = 0
        graph.instantiate()
        if not self._dry:
            graph.replay()
        return segment

    def abort(self) -> None:
        graph, self._graph = self._graph, None
        if graph is None:
            return
        try:
            with torch.cuda.stream(self._stream):
                _end_capture(graph)
        except RuntimeError:
            self._clean_up(graph, began=True)

    def _clean_up(self, graph: torch.cuda.CUDAGraph, *, began: bool) -> None:
        """Undo what a capture that failed to begin, or to end, left behind in torch."""
        release_failed(graph, self.pool, self._device.index, began=began)
        with torch.cuda.stream(self._stream), suppress(RuntimeError):
            # The random generators stay in capture mode until some capture ends well.
            settling = torch.cuda.CUDAGraph()
            settling.capture_begin(capture_error_mode=self._mode)
            _end_capture(settling)

    def check_stream(self, op: Any) -> None:
        if not torch.cuda.is_current_stream_capturing():
            raise UnjoinedStreamError(
                f"{op} runs on a stream outside the capture ({call_site()}), so no replay would "
                "run it. In each segment that uses a side stream, first call "
                "side_stream.wait_stream(torch.cuda.current_stream())."
            )

    def record(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        fresh: list[torch.Tensor],
        ownership: Ownership,
    ) -> Any:
        for tensor in fresh:
            storage = tensor.untyped_storage()
            if not tensor.is_cuda:
                ownership.hold(storage)
            elif self._in_pool(storage.data_ptr()):
                if ownership.note_made(storage):
                    self._asked += _block_bytes(storage.nbytes())
            else:
                ownership.note_read(f"{op} (its result is an older tensor)", tensor)
        return result

    def _in_pool(self, address: int) -> bool:
        if self._covers(address):
            return True
        self._look_at_pool()
        return self._covers(address)

    def _look_at_pool(self) -> None:
        """Note the pool's memory, and how much of it is new."""
        self._ranges = sorted(
            (segment["address"], segment["address"] + segment["total_size"])
            for segment in pool_segments(self.pool)
        )
        num_bytes = sum(end - begin for begin, end in self._ranges)
        self._grown += num_bytes - self._pool_bytes
        self._pool_bytes = num_bytes

    def _covers(self, address: int) -> bool:
        at = bisect_right(self._ranges, (address, 1 << 63)) - 1
        return at >= 0 and address < self._ranges[at][1]

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        same = torch._C._construct_storage_from_data_pointer(
            storage.data_ptr(), tensor.device, storage.nbytes()
        )
        return tensor_at(same, tensor, tensor.device)

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        index = self._device.index
        torch._C._cuda_beginAllocateCurrentThreadToPool(index, self.pool)
        try:
            landed = torch.empty_like(tensor, device=self._device)
        finally:
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        storage = landed.untyped_storage()
        self._asked += _block_bytes(storage.nbytes())
        self._in_pool(storage.data_ptr())  # notes what the pool grew by
        return landed


def _block_bytes(num_bytes: int) -> int:
    """What the caching allocator gives for a request: multiples of 512 bytes."""
    return -(-num_bytes // 512) * 512


_quiet = threading.Lock()


def _end_capture(graph: torch.cuda.CUDAGraph) -> None:
    """``capture_end`` without its warning that the graph is empty, which a segment may be."""
    with _quiet, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        graph.capture_end()


class _Streams(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[int, torch.cuda.Stream] = {}


_streams = _Streams()


def default_capture_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's capture stream: one for all graphs, or their pool could not reuse memory."""
    stream = _streams.by_device.get(device.index)
    if stream is None:
        stream = _streams.by_device[device.index] = torch.cuda.Stream(device)
    return stream
