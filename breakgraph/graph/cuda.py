"""What cuda-python is asked: is this stream capturing, what is in the graph, who forked.

Imported only when a CUDA capture begins, so that the package loads without CUDA.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from breakgraph.graph.callsite import call_site
from breakgraph.graph.errors import BreakableGraphError, UnjoinedStreamError


def require_cuda_python() -> Any:
    """The ``cuda.bindings.runtime`` module.

    Raises:
        BreakableGraphError: on ROCm, where there is no GPU, or if cuda-python is not installed.
    """
    if torch.version.hip is not None:
        raise BreakableGraphError(
            "breakable CUDA graphs need an NVIDIA GPU; this torch is built for ROCm, whose graphs "
            "cannot be asked for their capture state. Run without --enable-breakable-cuda-graph."
        )
    if not torch.cuda.is_available():
        raise BreakableGraphError(
            "a capture on cuda was asked for, and torch sees no CUDA device; use device='cpu'"
        )
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BreakableGraphError(
            "breakable CUDA graphs on a GPU need cuda-python, which is not installed. Install it "
            f"with: pip install 'cuda-python>={torch.version.cuda or '12.8'},"
            f"<{int((torch.version.cuda or '12').split('.')[0]) + 1}'"
        ) from error


def check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of a cuda-python result. Raises BreakableGraphError on a CUDA error."""
    if int(result[0]) != 0:
        raise BreakableGraphError(f"CUDA call failed: {result[0]!r}")
    return result[1:]


class StreamCapture:
    """The capture under way on ``stream``, seen through cuda-python."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._rt = require_cuda_python()
        self._ask = getattr(
            self._rt, "cudaStreamGetCaptureInfo_v2", self._rt.cudaStreamGetCaptureInfo
        )
        self._stream = stream.cuda_stream

    def _info(self, stream: int) -> tuple[Any, ...]:
        return check(self._ask(stream))

    def num_nodes(self) -> int | None:
        """Nodes captured so far; None if the capture was invalidated, or there is none."""
        info = self._info(self._stream)
        if info[0] != self._rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
            return None
        return int(check(self._rt.cudaGraphGetNodes(info[2], 0))[1])

    def check_joined(self, forks: dict[int, str]) -> None:
        """Raise UnjoinedStreamError if work of a forked stream does not reach the main one.

        Args:
            forks: CUDA stream handle to the call that forked it.
        """
        info = self._info(self._stream)
        graph, main = info[2], {int(node) for node in info[3]}
        _, count = check(self._rt.cudaGraphGetNodes(graph, 0))
        nodes, _ = check(self._rt.cudaGraphGetNodes(graph, count))
        edges = check(self._rt.cudaGraphGetEdges(graph, 0))[-1]
        sources = check(self._rt.cudaGraphGetEdges(graph, edges))[0] if edges else []
        leaves = unjoined_nodes([int(n) for n in nodes], [int(n) for n in sources], main)
        if not leaves:
            return
        for stream, site in forks.items():
            if leaves & {int(node) for node in self._info(stream)[3] or ()}:
                raise UnjoinedStreamError(
                    f"a stream forked at {site} still has work that was not joined when the "
                    "segment ended. Before the break (or the end of the capture) call "
                    "torch.cuda.current_stream().wait_stream(side_stream)."
                )
        raise UnjoinedStreamError(
            f"{len(leaves)} captured operations on a side stream were not joined when the segment "
            "ended; call torch.cuda.current_stream().wait_stream(side_stream) before the break."
        )


def unjoined_nodes(nodes: Iterable[int], sources: Iterable[int], main: set[int]) -> set[int]:
    """Nodes that nothing depends on and that the main stream does not end in."""
    return set(nodes) - set(sources) - main


def kernel_names(graph: torch.cuda.CUDAGraph) -> list[str]:
    """One name a node of a kept graph: the kernel's, or the node type for the others."""
    rt = require_cuda_python()
    driver = importlib.import_module("cuda.bindings.driver")
    raw = rt.cudaGraph_t(init_value=int(graph.raw_cuda_graph()))
    _, count = check(rt.cudaGraphGetNodes(raw, 0))
    nodes, _ = check(rt.cudaGraphGetNodes(raw, count))
    names = []
    for node in nodes:
        kind = check(rt.cudaGraphNodeGetType(node))[0]
        name = kind.name.removeprefix("cudaGraphNodeType")
        if name == "Kernel":
            params = check(driver.cuGraphKernelNodeGetParams(driver.CUgraphNode(int(node))))[0]
            if int(params.func):
                name = check(driver.cuFuncGetName(params.func))[0].decode()
            else:
                name = check(driver.cuKernelGetName(params.kern))[0].decode()
        names.append(name)
    return names


def pool_segments(pool: tuple[int, int]) -> list[dict[str, Any]]:
    """What ``torch.cuda.memory_snapshot`` knows of one memory pool."""
    # torch 2.11 gives up a reference, which it does not own, to each part of the id. Past 256
    # an int is not immortal, and the next use of the id crashes; lend it the reference.
    for part in (*pool, False):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))
    return torch.cuda.memory_snapshot(pool, include_traces=False)


_failed: list[torch.cuda.CUDAGraph] = []


def release_failed(
    graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: int, *, began: bool
) -> None:
    """Take the hands of a capture that failed to begin, or to end, off its memory pool."""
    _failed.append(graph)  # the host allocator's filter may go on pointing to it
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        if not began or torch.__version__ >= "2.14":
            return  # it had taken no hold, or lets go of it itself
    torch._C._cuda_releasePool(device, pool)


class ForkWatch:
    """Notes the call that makes a side stream wait on a capturing one.

    ``torch.cuda.Event.wait`` is what every fork goes through; it is wrapped while at least
    one capture is under way, and tells the capture of its own thread only.
    """

    _lock = threading.Lock()
    _open = 0
    _plain: Callable[..., Any]
    _local = threading.local()

    def __init__(self, main: torch.cuda.Stream) -> None:
        self._main = main.cuda_stream
        self.forks: dict[int, str] = {}

    def __enter__(self) -> ForkWatch:
        cls = ForkWatch
        cls._local.watch = self
        with cls._lock:
            cls._open += 1
            if cls._open == 1:
                cls._plain = torch.cuda.Event.wait
                torch.cuda.Event.wait = _noting_wait  # type: ignore
        return self

    def __exit__(self, *exc: object) -> None:
        cls = ForkWatch
        cls._local.watch = None
        with cls._lock:
            cls._open -= 1
            if cls._open == 0:
                torch.cuda.Event.wait = cls._plain  # type: ignore

    def note(self, stream: torch.cuda.Stream) -> None:
        if stream.cuda_stream != self._main:
            self.forks[stream.cuda_stream] = call_site()


def _noting_wait(event: Any, stream: Any = None) -> None:
    watch = getattr(ForkWatch._local, "watch", None)
    if watch is not None:
        watch.note(torch.cuda.current_stream() if stream is None else stream)
    ForkWatch._plain(event, stream)
