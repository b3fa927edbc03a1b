"""What a captured graph holds and where a replay's time goes, step by step."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from breakgraph.graph.breakable_graph import (
    BreakableCUDAGraph,
    Step,
    enable_breakable_cuda_graph,
)
from breakgraph.graph.errors import BreakableGraphError
from breakgraph.graph.tape import TapePool

Kind = Literal["segment", "break"]


@dataclass(kw_only=True, frozen=True, slots=True)
class StepInfo:
    """One step of a replay; a break shows none of the ops that it runs."""

    name: str
    kind: Kind
    nodes: int
    """Graph nodes of a segment (ops, on CPU); 0 for a break."""
    op_names: tuple[str, ...]
    """Kernels in capture order, other nodes by their type; aten ops on CPU."""
    asked_bytes: int = 0
    """What a segment asked of the pool, with where the break before it lands."""
    grown_bytes: int = 0
    """By how much the pool grew for it; the rest reused what earlier tensors had freed."""


@dataclass(kw_only=True, frozen=True, slots=True)
class StepTiming:
    """Medians of one step over some replays, in microseconds."""

    name: str
    kind: Kind
    host_us: float
    """What the host spent in the step: a launch, or all of a break's Python."""
    device_us: float
    """Between CUDA events around the step, waits for the host included; wall time on CPU."""


def describe(graph: BreakableCUDAGraph) -> list[StepInfo]:
    """The steps of a captured graph, in replay order."""
    graph.pool()
    infos = []
    for step in graph.steps:
        segment = step.segment
        if segment is None:
            infos.append(StepInfo(name=step.name, kind="break", nodes=0, op_names=()))
            continue
        infos.append(
            StepInfo(
                name=step.name,
                kind="segment",
                nodes=segment.num_nodes,
                op_names=tuple(segment.node_names()),
                asked_bytes=segment.asked_bytes,
                grown_bytes=segment.grown_bytes,
            )
        )
    return infos


def time_steps(graph: BreakableCUDAGraph, repeats: int = 20) -> list[StepTiming]:
    """Replay ``graph`` ``repeats`` times, step by step, and time each step.

    A replay writes what it always writes, and its breaks read the live batch: call this
    where ``graph.replay()`` could be called.
    """
    if repeats < 1:
        raise BreakableGraphError(f"repeats is {repeats}; time at least one replay")
    on_cpu = isinstance(graph.pool(), TapePool)
    host: list[list[float]] = [[] for _ in graph.steps]
    device: list[list[float]] = [[] for _ in graph.steps]
    with torch.no_grad(), enable_breakable_cuda_graph():
        for _ in range(repeats):
            events = [] if on_cpu else [_recorded_event()]
            for step, times in zip(graph.steps, host, strict=True):
                start = time.perf_counter_ns()
                step.run()
                times.append((time.perf_counter_ns() - start) / 1e3)
                if not on_cpu:
                    events.append(_recorded_event())
            if not on_cpu:
                events[-1].synchronize()
                for times, (before, after) in zip(device, pairwise(events), strict=True):
                    times.append(before.elapsed_time(after) * 1e3)
    return [
        StepTiming(
            name=step.name,
            kind=_kind(step),
            host_us=statistics.median(on_host),
            device_us=statistics.median(on_host if on_cpu else on_device),
        )
        for step, on_host, on_device in zip(graph.steps, host, device, strict=True)
    ]


def format_table(infos: Sequence[StepInfo], timings: Sequence[StepTiming] = ()) -> str:
    """``describe``'s rows, beside ``time_steps``' if given, as an aligned table with a total."""
    rows = [["step", "kind", "nodes"] + ["host µs", "device µs"] * bool(timings) + ["ops"]]
    for at, info in enumerate(infos):
        row = [info.name, info.kind, str(info.nodes)]
        if timings:
            row += [f"{timings[at].host_us:.1f}", f"{timings[at].device_us:.1f}"]
        rows.append([*row, _summary(info.op_names)])
    total = ["total", "", str(sum(info.nodes for info in infos))]
    if timings:
        total += [
            f"{sum(timing.host_us for timing in timings):.1f}",
            f"{sum(timing.device_us for timing in timings):.1f}",
        ]
    rows.append([*total, ""])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 1 < at < last else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _summary(names: Sequence[str], shown: int = 3, width: int = 48) -> str:
    """The most frequent names, cut to ``width``, with their counts."""
    counts = Counter(names).most_common()
    parts = [
        (name if len(name) <= width else name[: width - 1] + "…") + (f" ×{n}" if n > 1 else "")
        for name, n in counts[:shown]
    ]
    return ", ".join(parts) + (f", {len(counts) - shown} more" if len(counts) > shown else "")


def _kind(step: Step) -> Kind:
    return "break" if step.segment is None else "segment"


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
