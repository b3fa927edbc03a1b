"""Breakable CUDA graphs for any torch code.

The address-stability contract. A graph is a row of segments with eager breaks between
them; a replay runs the same segments over the same addresses and calls the breaks anew.
Therefore:

- a tensor that the capture made lives in the graph's pool and is held by address, so that
  the next layer can reuse its memory; every other tensor a segment or a break reads is held
  for as long as the graph lives;
- a break takes tensors and constants, nothing that can change behind its back;
- what a break returns is written back to where the first result landed.

Example::

    @eager_on_graph()
    def mix(x, out):          # runs eagerly, at capture and at every replay
        out.copy_(x.cumsum(0) * int(x.count_nonzero()))

    graph = BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph):
        y = x * 2
        out = torch.empty_like(y)
        mix(y, out)
        z = out + 1
    x.copy_(new)
    graph.replay()            # z now holds the result for the new x
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from breakgraph.graph.arguments import freeze, tensors_in
from breakgraph.graph.audit import CaptureAudit
from breakgraph.graph.cuda import require_cuda_python
from breakgraph.graph.cuda_segments import CudaBackend
from breakgraph.graph.errors import BreakableGraphError
from breakgraph.graph.host_reads import HostReadWatch
from breakgraph.graph.landing import Landing
from breakgraph.graph.provenance import Ownership, SegmentMode
from breakgraph.graph.segments import Segment, SegmentBackend
from breakgraph.graph.tape_segments import TapeBackend

F = TypeVar("F", bound=Callable[..., Any])


class _Local(threading.local):
    capture: BreakableCUDAGraphCapture | None = None
    inside: bool = False


_local = _Local()


@dataclass(frozen=True, slots=True)
class Step:
    """One stop of a replay: a segment, or the break called ``name``."""

    name: str
    run: Callable[[], Any]
    segment: Segment | None = None


class BreakableCUDAGraph:
    """A captured row of segments and breaks. Filled by ``BreakableCUDAGraphCapture``."""

    def __init__(self) -> None:
        self._steps: tuple[Step, ...] = ()
        self._run: tuple[Callable[[], Any], ...] = ()
        self._anchors: list[Segment] = []
        self._held: list[torch.UntypedStorage] = []
        self._pool: Any = None
        self._captured = False

    @property
    def steps(self) -> tuple[Step, ...]:
        """Segments and breaks in replay order; an empty segment is left out."""
        return self._steps

    @property
    def num_segments(self) -> int:
        return sum(step.segment is not None for step in self._steps)

    @property
    def num_breaks(self) -> int:
        return sum(step.segment is None for step in self._steps)

    def pool(self) -> Any:
        """The memory pool, to capture another graph into. Raises if nothing is captured."""
        self._check_captured("has no pool")
        return self._pool

    def replay(self) -> None:
        """Run every segment and every break on the current stream.

        Raises:
            BreakableGraphError: if nothing is captured, or while a segment is captured.
            LayoutChangedError: if a break returns another layout than at capture.
        """
        self._check_captured("cannot be replayed")
        if _segment_open():
            raise BreakableGraphError("a breakable graph cannot be replayed inside a segment")
        outer, _local.inside = _local.inside, True
        try:
            with torch.no_grad():
                for run in self._run:
                    run()
        finally:
            _local.inside = outer

    def reset(self) -> None:
        """Let go of executables, pool memory and held tensors; the object can capture again."""
        for segment in self._anchors:
            segment.reset()
        self._steps, self._run, self._anchors, self._held = (), (), [], []
        self._pool, self._captured = None, False

    def _install(
        self, steps: list[Step], anchors: list[Segment], held: list[torch.UntypedStorage], pool: Any
    ) -> None:
        self._steps, self._run = tuple(steps), tuple(step.run for step in steps)
        self._anchors, self._held, self._pool, self._captured = anchors, held, pool, True

    def _check_captured(self, problem: str) -> None:
        if not self._captured:
            raise BreakableGraphError(
                f"this breakable graph {problem}: nothing is captured in it. Capture first, with "
                "`with BreakableCUDAGraphCapture(graph): ...`"
            )


class BreakableCUDAGraphCapture:
    """Captures the code of its ``with`` block, running it once, under ``torch.no_grad``.

    Args:
        cuda_graph: what to capture into; an earlier capture in it is reset.
        pool: memory to share with other graphs: what ``BreakableCUDAGraph.pool()`` or
            ``torch.cuda.graph_pool_handle()`` gives (a ``TapePool`` on CPU). None makes one
            pool for all segments of this graph. Graphs that share a pool overwrite each
            other's outputs, and must be captured on one stream to reuse its memory.
        stream: the capture stream; None takes one that all captures of a thread share.
        capture_error_mode: as for ``torch.cuda.graph``.
        device: CUDA if there, else CPU.
        audit: refuses reads of tensors that go stale; None holds them alive instead.
        breaks: False captures what ``eager_on_graph`` marks like any other code, so that the
            graph is one segment.
        dry: capture alone: no segment runs, nor does a break that is marked ``in_place``. What
            the captured code makes then holds nothing before the first replay. A tape, on CPU,
            runs its ops anyway.

    Raises:
        BreakableGraphError: inside another capture, under inference mode, on ROCm, or on CUDA
            without a GPU or without cuda-python. An exception in the block ends the capture,
            leaves the graph empty and propagates.
    """

    def __init__(
        self,
        cuda_graph: BreakableCUDAGraph,
        pool: Any = None,
        stream: torch.cuda.Stream | None = None,
        capture_error_mode: str = "thread_local",
        device: torch.device | str | None = None,
        *,
        audit: CaptureAudit | None = None,
        breaks: bool = True,
        dry: bool = False,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        if device.type not in ("cuda", "cpu"):
            raise BreakableGraphError(f"breakable graphs run on cuda and cpu, not on {device}")
        self._graph, self._device = cuda_graph, device
        self._options = (pool, stream, capture_error_mode)
        self._audit = audit
        self._breaks, self._dry = breaks, dry
        self._num_segments = 0

    def __enter__(self) -> BreakableCUDAGraph:
        if _local.capture is not None:
            raise BreakableGraphError("a breakable capture is under way; captures do not nest")
        if torch.is_inference_mode_enabled():
            raise BreakableGraphError(
                "a breakable capture sees ops only below torch.inference_mode; capture under "
                "torch.no_grad() instead"
            )
        self._graph.reset()
        self._ownership = Ownership(self._audit)
        self._backend = self._make_backend()
        self._mode = SegmentMode(self._ownership, self._backend)
        self._steps: list[Step] = []
        self._num_segments = 0
        self._anchors: list[Segment] = []
        self._failure: BaseException | None = None
        with ExitStack() as stack:
            stack.enter_context(_gc_off)
            stack.enter_context(torch.no_grad())
            self._backend.enter(stack)
            stack.callback(self._mode.close)
            stack.enter_context(HostReadWatch(self._mode.sees))
            stack.callback(self._leave)
            _local.capture, self._outer_inside = self, _local.inside
            _local.inside = self._breaks
            self._begin()
            self._stack = stack.pop_all()
        return self._graph

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if exc is not None:
                self._abandon()
            elif self._failure is not None:
                self._abandon()
                raise BreakableGraphError(
                    "a break raised during capture and the captured code went on; the graph would "
                    "lack what followed"
                ) from self._failure
            else:
                try:
                    self._end()
                except BaseException:
                    self._abandon()
                    raise
                held = list(self._ownership.held.values())
                self._graph._install(self._steps, self._anchors, held, self._backend.pool)

    @property
    def num_segments(self) -> int:
        """Segments closed so far."""
        return self._num_segments

    def _make_backend(self) -> SegmentBackend:
        pool, stream, mode = self._options
        if self._device.type == "cpu":
            return TapeBackend(pool)
        require_cuda_python()
        return CudaBackend(self._device, pool, stream, mode, dry=self._dry)

    def _begin(self) -> None:
        self._backend.begin()
        self._mode.watch()

    def _end(self) -> None:
        self._mode.unwatch()
        segment = self._backend.end()
        self._anchors.append(segment)
        if segment.num_nodes:
            self._steps.append(Step(f"segment {self._num_segments}", segment.replay, segment))
            self._num_segments += 1

    def _abandon(self) -> None:
        self._mode.unwatch()
        self._backend.abort()
        for segment in self._anchors:
            segment.reset()

    def _leave(self) -> None:
        _local.capture, _local.inside = None, self._outer_inside
        self._failure = None  # or its traceback would hold this object, and what it holds

    def _break(
        self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any, *, in_place: bool
    ) -> Any:
        self._mode.unwatch()
        try:
            frozen_args, frozen_kwargs = freeze(
                name, args, kwargs, functools.partial(self._fix, name)
            )
            self._end()
            result = None if in_place and self._dry else fn(*args, **kwargs)
            landing = Landing(name, result, tensors_in((args, kwargs)), self)
            self._steps.append(Step(name, _bind(fn, frozen_args, frozen_kwargs, landing)))
            self._begin()
        except BaseException as error:
            self._failure = error
            raise
        return landing.value

    def _fix(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._ownership.is_made(tensor):
            return self._backend.alias(tensor)
        self._ownership.note_read(f"break {name}", tensor)
        return tensor.detach()

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a break's result: the pool's, or the tensor's own kind off the device."""
        if tensor.device.type != self._device.type:
            return torch.empty_like(tensor)
        landed = self._backend.allocate_like(tensor)
        self._ownership.note_made(landed.untyped_storage())
        return landed

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._backend.alias(tensor) if self._ownership.is_made(tensor) else tensor


def _bind(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], landing: Landing
) -> Callable[[], None]:
    write = landing.write
    if kwargs:
        return lambda: write(fn(*args, **kwargs))
    return lambda: write(fn(*args))


class _Break:
    """A function that runs eagerly between segments, and plainly everywhere else."""

    def __init__(self, fn: Callable[..., Any], in_place: bool) -> None:
        self._fn, self._in_place = fn, in_place
        functools.update_wrapper(self, fn)

        @functools.wraps(fn)
        def method(instance: Any, /, *args: Any, **kwargs: Any) -> Any:
            return _run(fn, fn.__get__(instance), args, kwargs, in_place)

        self._method: Any = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self._fn, self._fn, args, kwargs, self._in_place)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._method.__get__(instance, owner)


def _run(
    named: Callable[..., Any], fn: Callable[..., Any], args: Any, kwargs: Any, in_place: bool
) -> Any:
    capture = _local.capture
    if capture is None or not capture._breaks or not capture._mode.watching:
        return fn(*args, **kwargs)
    name = getattr(named, "__qualname__", type(named).__qualname__)
    return capture._break(name, fn, args, kwargs, in_place=in_place)


def eager_on_graph(enable: bool = True, *, in_place: bool = False) -> Callable[[F], F]:
    """Decorator: run a function or method as an eager break of a breakable graph.

    Under a capture the call ends the segment before it, runs, and starts the next one; each
    replay calls it again. Anywhere else, and inside another break, it runs plainly. Its
    arguments are tensors and constants; for a method, the object it is bound to is fixed too.

    Args:
        enable: False returns the function itself.
        in_place: it returns None and writes into its arguments alone, so a capture that runs
            nothing need not call it.
    """

    def decorate(fn: F) -> F:
        return _Break(fn, in_place) if enable else fn  # type: ignore[return-value]

    return decorate


@eager_on_graph(in_place=True)
def break_graph() -> None:
    """End the current segment and start another, with nothing run between them."""


def is_in_breakable_cuda_graph() -> bool:
    """Whether this thread captures or replays a breakable graph, or says that it will."""
    return _local.inside


@contextmanager
def enable_breakable_cuda_graph() -> Iterator[None]:
    """Make ``is_in_breakable_cuda_graph`` true, for a warm-up that takes the captured path."""
    outer, _local.inside = _local.inside, True
    try:
        yield
    finally:
        _local.inside = outer


def _segment_open() -> bool:
    return _local.capture is not None and _local.capture._mode.watching


class _GcOff:
    """Garbage collection off while any thread captures: a finaliser may free CUDA objects."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if self._open == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._open += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._was_on:
                gc.enable()


_gc_off = _GcOff()
