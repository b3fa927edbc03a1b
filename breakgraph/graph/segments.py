"""Segments: the captured stretches between breaks, on a GPU or on the tape.

All segments of a graph live in one pool and are captured on one stream; a pool block freed
in one segment serves the next, which is safe because replays run in capture order. A
segment is run once as soon as it is captured, so that the break after it works on real
values at capture too, on both devices alike.
"""

from __future__ import annotations

import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from breakgraph.graph.arguments import map_tensors, tensors_in
from breakgraph.graph.callsite import call_site
from breakgraph.graph.cuda import (
    ForkWatch,
    StreamCapture,
    kernel_names,
    pool_segments,
    release_failed,
)
from breakgraph.graph.errors import BreakableGraphError, UnjoinedStreamError
from breakgraph.graph.tape import UNWRITTEN, Tape, TapePool, refuse_uncapturable

if TYPE_CHECKING:
    from breakgraph.graph.provenance import Ownership


class Segment(Protocol):
    """One captured stretch."""

    replay: Callable[[], Any]
    num_nodes: int

    def node_names(self) -> list[str]:
        """The kernels or ops, in capture order."""

    def reset(self) -> None:
        """Let go of executables and memory."""


class SegmentBackend(Protocol):
    """How segments are captured on one kind of device."""

    pool: Any

    def enter(self, stack: ExitStack) -> None:
        """Make the device ready for segments; what ``stack`` unwinds restores it."""

    def begin(self) -> None: ...

    def end(self) -> Segment:
        """Close the open segment and run it once."""

    def abort(self) -> None:
        """Close the open segment, whatever state it is in, without raising."""

    def refuse(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def record(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        fresh: list[torch.Tensor],
        ownership: Ownership,
    ) -> Any:
        """Note an op that just ran; returns the result for the caller."""

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same pool memory, without keeping it from reuse."""

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pool memory of the tensor's layout, between segments."""


def _at(storage: Any, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    bare = torch.empty(0, dtype=like.dtype, device=device)
    same = bare.set_(storage, like.storage_offset(), like.size(), like.stride())
    same = same.conj() if like.is_conj() else same
    return same._neg_view() if like.is_neg() else same


_CPU = torch.device("cpu")


class TapeSegment:
    """A tape, run by the same protocol as a CUDA graph."""

    def __init__(self, tape: Tape) -> None:
        self.replay: Callable[[], Any] = tape.replay
        self.num_nodes = len(tape)
        self._tape: Tape | None = tape

    def node_names(self) -> list[str]:
        return self._tape.op_names if self._tape is not None else []

    def reset(self) -> None:
        self._tape = None
        self.replay = lambda: None


class TapeBackend:
    """Segments on the CPU."""

    def __init__(self, pool: TapePool | None) -> None:
        self.pool = TapePool() if pool is None else pool
        self._tape = Tape()
        self._blocks: dict[int, torch.UntypedStorage] = {}

    def enter(self, stack: ExitStack) -> None:
        stack.callback(self._blocks.clear)

    def begin(self) -> None:
        self._tape = Tape()

    def end(self) -> TapeSegment:
        return TapeSegment(self._tape)

    def abort(self) -> None:
        self._tape = Tape()

    def refuse(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_uncapturable(op, args, kwargs, allow_random=False)

    def record(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        fresh: list[torch.Tensor],
        ownership: Ownership,
    ) -> Any:
        results = tensors_in(result)
        views_only = results and not fresh and not op._schema.is_mutable
        if views_only or torch.Tag.inplace_view in op.tags:
            return result
        moved: dict[int, torch.UntypedStorage] = {}
        landed = {id(tensor): self._land(tensor, moved, ownership) for tensor in fresh}
        if op.overloadpacket not in UNWRITTEN:
            self._tape.record(
                op,
                map_tensors(args, self._by_address),
                map_tensors(kwargs, self._by_address),
                [self.alias(landed[id(t)]) if id(t) in landed else None for t in results],
            )
        return map_tensors(result, lambda tensor: landed.get(id(tensor), tensor))

    def _land(
        self, tensor: torch.Tensor, moved: dict[int, torch.UntypedStorage], ownership: Ownership
    ) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in moved:
            moved[storage._cdata] = self._allocate(storage.nbytes())
        landed = _at(moved[storage._cdata], tensor, _CPU)
        landed.copy_(tensor)
        ownership.note_made(landed)
        return landed

    def _allocate(self, num_bytes: int) -> torch.UntypedStorage:
        owner, block = self.pool.allocate(num_bytes)
        self._blocks[owner._cdata] = block
        return owner

    def _by_address(self, tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.untyped_storage()._cdata in self._blocks
        return self.alias(tensor) if made else tensor.detach()

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        return _at(self._blocks[tensor.untyped_storage()._cdata], tensor, _CPU)

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        layout = torch.empty_like(tensor, device="meta")
        return _at(self._allocate(layout.untyped_storage().nbytes()), layout, _CPU)


class CudaSegment:
    """A CUDA graph of at least one node, instantiated."""

    def __init__(self, graph: torch.cuda.CUDAGraph, num_nodes: int) -> None:
        self.replay: Callable[[], Any] = graph.replay
        self.num_nodes = num_nodes
        self._graph = graph

    def node_names(self) -> list[str]:
        return kernel_names(self._graph) if self.num_nodes else []

    def reset(self) -> None:
        self.replay = lambda: None
        self._graph.reset()


class CudaBackend:
    """Segments on a GPU: one ``torch.cuda.CUDAGraph`` each, all in one pool."""

    def __init__(
        self,
        device: torch.device,
        pool: Any,
        stream: torch.cuda.Stream | None,
        capture_error_mode: str,
    ) -> None:
        self._device = device
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._stream = stream if stream is not None else default_capture_stream(device)
        self._mode = capture_error_mode
        self._capture = StreamCapture(self._stream)
        self._watch = ForkWatch(self._stream)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ranges: list[tuple[int, int]] = []

    def enter(self, stack: ExitStack) -> None:
        stack.enter_context(torch.cuda.device(self._device))
        if torch.cuda.is_current_stream_capturing():
            raise BreakableGraphError("the current stream is under capture; captures do not nest")
        outer = torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        stack.callback(outer.wait_stream, self._stream)
        stack.enter_context(torch.cuda.stream(self._stream))
        stack.enter_context(self._watch)
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
        graph = self._graph
        if graph is None or not self._capture.active:
            raise BreakableGraphError(
                "the stream capture of this segment was invalidated by an earlier CUDA error that "
                "the captured code swallowed"
            )
        if self._watch.forks:
            self._capture.check_joined(self._watch.forks)
        num_nodes = self._capture.num_nodes()
        _end_capture(graph)
        self._graph = None
        segment = CudaSegment(graph, num_nodes)
        if num_nodes:
            graph.instantiate()
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

    def refuse(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.cuda.is_current_stream_capturing():
            raise UnjoinedStreamError(
                f"{op} runs on a stream outside the capture ({call_site()}), so no replay would "
                "run it. In each segment that uses a side stream, first call "
                "side_stream.wait_stream(torch.cuda.current_stream())."
            )
        refuse_uncapturable(op, args, kwargs, allow_random=True)

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
            if tensor.device.type != "cuda":
                ownership.hold(tensor)
            elif self._in_pool(tensor):
                ownership.note_made(tensor)
            else:
                ownership.note_read(f"{op} (its result is an older tensor)", tensor)
        return result

    def _in_pool(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        if not self._covers(address):
            self._ranges = sorted(
                (segment["address"], segment["address"] + segment["total_size"])
                for segment in pool_segments(self.pool)
            )
        return self._covers(address)

    def _covers(self, address: int) -> bool:
        at = bisect_right(self._ranges, (address, 1 << 63)) - 1
        return at >= 0 and address < self._ranges[at][1]

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        same = torch._C._construct_storage_from_data_pointer(
            storage.data_ptr(), tensor.device, storage.nbytes()
        )
        return _at(same, tensor, tensor.device)

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        index = self._device.index
        torch._C._cuda_beginAllocateCurrentThreadToPool(index, self.pool)
        try:
            return torch.empty_like(tensor, device=self._device)
        finally:
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)


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
