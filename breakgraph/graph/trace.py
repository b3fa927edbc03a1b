"""One replay on a time axis: when the host was in which step, and what the device ran for it.

All times of a trace are microseconds from the begin of its first step, on the host's and on the
device's side alike. On the CPU the two sides are one: a segment's ops are timed on the tape, and
the fastest of several replays for each op are laid end to end. On a GPU, CUPTI (by
``torch.profiler``) times each kernel and the runtime call that launched it; a kernel belongs to
the step in which the host made that call. The profiler's clock is tied to the host's by a few
stream synchronisations that both sides time.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from breakgraph.graph.breakable_graph import BreakableCUDAGraph, enable_breakable_cuda_graph
from breakgraph.graph.errors import BreakableGraphError
from breakgraph.graph.inspect import Kind
from breakgraph.graph.tape import TapePool
from breakgraph.graph.tape_segments import TapeSegment

SYNC = "cudaStreamSynchronize"
_NUM_SYNCS = 5


@dataclass(frozen=True, slots=True)
class OpSpan:
    """One kernel, or one op of a tape."""

    name: str
    start_us: float
    end_us: float

    @property
    def us(self) -> float:
        return self.end_us - self.start_us


@dataclass(kw_only=True, frozen=True, slots=True)
class StepTrace:
    """One step; ``ops`` are in order of their begin, and none for a break on the CPU."""

    name: str
    kind: Kind
    host_start_us: float
    host_end_us: float
    ops: tuple[OpSpan, ...] = ()

    @property
    def host_us(self) -> float:
        return self.host_end_us - self.host_start_us


@dataclass(kw_only=True, frozen=True, slots=True)
class Trace:
    """Steps in the order the host took them."""

    steps: tuple[StepTrace, ...]
    on_cpu: bool
    wall_us: float
    """Of a run, the device's part included: a median of runs without the profiler on a GPU, the
    fastest of each of its parts, laid end to end, on a CPU."""

    @property
    def end_us(self) -> float:
        """Where the last step ends, on either side."""
        ends = [step.host_end_us for step in self.steps]
        return max(ends + [op.end_us for step in self.steps for op in step.ops], default=0.0)

    def spans(self, step: StepTrace) -> tuple[OpSpan, ...]:
        """When the device worked for ``step``: its ops; on the CPU the step itself."""
        if self.on_cpu:
            return (OpSpan(step.name, step.host_start_us, step.host_end_us),)
        return step.ops

    def device_us(self, step: StepTrace) -> float:
        return sum(span.us for span in self.spans(step))

    @property
    def busy_us(self) -> float:
        """With at least one op under way."""
        return busy_us([span for step in self.steps for span in self.spans(step)])


@dataclass(frozen=True, slots=True)
class Window:
    """A step as the host saw it, by ``time.perf_counter_ns``; ``ops`` are a tape's."""

    name: str
    kind: Kind
    begin_ns: int
    end_ns: int
    ops: tuple[tuple[str, int, int], ...] = ()


def trace_graph(graph: BreakableCUDAGraph, repeats: int = 10) -> Trace:
    """A replay of ``graph``; the fastest of ``repeats`` for each op where it is the CPU's.

    A replay writes what it always writes, and its breaks read the live batch: call this where
    ``graph.replay()`` could be called.

    Raises:
        BreakableGraphError: nothing is captured, or ``repeats`` is less than 1.
    """
    on_cpu = isinstance(graph.pool(), TapePool)

    def run() -> list[Window]:
        windows = []
        for step in graph.steps:
            ops: list[tuple[str, int, int]] = []
            begin = time.perf_counter_ns()
            if isinstance(step.segment, TapeSegment):
                ops = step.segment.timed_replay()
            else:
                step.run()
            kind: Kind = "break" if step.segment is None else "segment"
            windows.append(Window(step.name, kind, begin, time.perf_counter_ns(), tuple(ops)))
        return windows

    with torch.no_grad(), enable_breakable_cuda_graph():
        return trace_run(run, on_cpu=on_cpu, repeats=repeats)


def trace_run(run: Callable[[], list[Window]], *, on_cpu: bool, repeats: int = 10) -> Trace:
    """What ``run`` does, which gives a window for each of its steps, in order."""
    if repeats < 1:
        raise BreakableGraphError(f"repeats is {repeats}; trace at least one run")
    walls, runs = [], []
    run()
    for _ in range(repeats):
        _synchronize(on_cpu)
        begin = time.perf_counter_ns()
        runs.append(run())
        _synchronize(on_cpu)
        walls.append((time.perf_counter_ns() - begin) / 1e3)
    if not on_cpu:
        return Trace(steps=_profiled(run), on_cpu=False, wall_us=statistics.median(walls))
    steps = [
        _step(w, 0, [OpSpan(name, a / 1e3, b / 1e3) for name, a, b in w.ops])
        for w in fastest_windows(runs)
    ]
    return Trace(steps=tuple(steps), on_cpu=True, wall_us=steps[-1].host_end_us if steps else 0.0)


def fastest_windows(runs: Sequence[Sequence[Window]]) -> list[Window]:
    """Runs of the same steps as one from 0 on: each op, and what is between two, at its fastest.

    A machine shared with others stops a run for milliseconds at a time, each run elsewhere: on one
    where a replay takes 20 ms alone, medians of whole runs were up to 660 ms.
    """
    instants = [_instants(windows) for windows in runs]
    if len({len(found) for found in instants}) > 1:
        raise BreakableGraphError("the runs to trace took other steps each; trace what repeats")
    gaps = [
        min(found[at + 1] - found[at] for found in instants) for at in range(len(instants[0]) - 1)
    ]
    times = iter(accumulate(gaps, initial=0))
    laid = []
    for window in runs[0]:
        begin = next(times)
        ops = tuple((name, next(times), next(times)) for name, _, _ in window.ops)
        laid.append(Window(window.name, window.kind, begin, next(times), ops))
    return laid


def _instants(windows: Sequence[Window]) -> list[int]:
    """Every begin and end, in order."""
    found = []
    for window in windows:
        inside = [instant for _, begin, end in window.ops for instant in (begin, end)]
        found += [window.begin_ns, *inside, window.end_ns]
    return found


def busy_us(spans: Sequence[OpSpan]) -> float:
    """Microseconds covered by at least one span."""
    busy, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_us):
        busy += max(0.0, span.end_us - max(span.start_us, end))
        end = max(end, span.end_us)
    return busy


@dataclass(frozen=True, slots=True)
class Event:
    """What the profiler tells of one kernel, or one runtime call; ``id`` is what ties the two."""

    name: str
    id: int
    start_us: float
    end_us: float


def place(
    windows: Sequence[Window],
    syncs: Sequence[tuple[int, int]],
    calls: Sequence[Event],
    kernels: Sequence[Event],
) -> tuple[StepTrace, ...]:
    """Steps with the kernels that the host launched in them.

    Args:
        windows: the steps, in order.
        syncs: host begin and end, in ns, of the synchronisations made just before them.
        calls: runtime calls, by the profiler's clock; ``syncs`` are the first as many that are
            ``SYNC`` and come one after the other.
        kernels: by the same clock. Those launched before ``syncs``, by a first run of the same
            steps, are left out.

    Raises:
        BreakableGraphError: no kernel has its call.
    """
    if not windows:
        return ()
    if kernels and not {kernel.id for kernel in kernels} & {call.id for call in calls}:
        raise BreakableGraphError(
            "the profiler gave kernels and none of the calls that launched them, so no kernel can "
            "be told to be a step's; this torch's CUPTI leaves the CUDA runtime out"
        )
    calls = sorted(calls, key=lambda call: call.start_us)
    seen = _first_row(calls, len(syncs))
    zero = windows[0].begin_ns
    if len(seen) == len(syncs) > 0:
        offset, begun = _offset(zero, syncs, seen), seen[0].start_us
    else:  # a profiler that left them out: the second half of the launches is the second run's
        ids = {kernel.id for kernel in kernels}
        launches = [call for call in calls if call.id in ids]
        begun = launches[len(launches) // 2].start_us if launches else 0.0
        offset = -begun
    # A launch's middle, as the two clocks agree to about a microsecond only.
    launched = {call.id: (call.start_us + call.end_us) / 2 for call in calls}
    begins = [(window.begin_ns - zero) / 1e3 for window in windows]
    ops: list[list[OpSpan]] = [[] for _ in windows]
    at = 0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_us):
        called = launched.get(kernel.id, kernel.start_us if kernel.start_us < begun else None)
        if called is not None:
            if called < begun:
                continue
            at = max(0, bisect_right(begins, called + offset) - 1)
        ops[at].append(OpSpan(kernel.name, kernel.start_us + offset, kernel.end_us + offset))
    return tuple(_step(window, zero, spans) for window, spans in zip(windows, ops, strict=True))


def _first_row(calls: Sequence[Event], count: int) -> list[Event]:
    """The first ``count`` calls in a row that are syncs: breaks make syncs too, one at a time."""
    row: list[Event] = []
    for call in calls:
        row = [*row, call] if call.name == SYNC else []
        if len(row) == count:
            break
    return row


def _offset(zero: int, syncs: Sequence[tuple[int, int]], seen: Sequence[Event]) -> float:
    """What to add to the profiler's microseconds; by the call that the two timed most alike."""
    pairs = [
        ((begin - zero) / 1e3, (end - zero) / 1e3, event)
        for (begin, end), event in zip(syncs, seen, strict=True)
    ]
    begin, end, event = min(
        pairs, key=lambda pair: (pair[1] - pair[0]) - (pair[2].end_us - pair[2].start_us)
    )
    return (begin + end) / 2 - (event.start_us + event.end_us) / 2


def _profiled(run: Callable[[], list[Window]]) -> tuple[StepTrace, ...]:
    activity = torch.profiler.ProfilerActivity.CUDA
    stream, syncs = torch.cuda.current_stream(), []
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity]) as profile:
        run()  # the first launches under CUPTI set things up
        torch.cuda.synchronize()
        for _ in range(_NUM_SYNCS):
            begin = time.perf_counter_ns()
            stream.synchronize()
            syncs.append((begin, time.perf_counter_ns()))
        windows = run()
        torch.cuda.synchronize()
    calls: list[Event] = []
    kernels: list[Event] = []
    for found in profile.events() or ():
        span = found.time_range
        event = Event(found.name, found.id, span.start, span.end)
        (kernels if found.device_type.name == "CUDA" else calls).append(event)
    if windows and not kernels:
        raise BreakableGraphError(
            "the profiler saw no kernel. Another one may be attached, or the driver may keep "
            "CUPTI to administrators (NVreg_RestrictProfilingToAdminUsers)"
        )
    return place(windows, syncs, calls, kernels)


def _step(window: Window, zero: int, ops: Sequence[OpSpan]) -> StepTrace:
    return StepTrace(
        name=window.name,
        kind=window.kind,
        host_start_us=(window.begin_ns - zero) / 1e3,
        host_end_us=(window.end_ns - zero) / 1e3,
        ops=tuple(ops),
    )


def _synchronize(on_cpu: bool) -> None:
    if not on_cpu:
        torch.cuda.synchronize()
