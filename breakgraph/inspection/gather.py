"""What a forward was captured as, and where its time goes, replayed and eager.

The figures are of one batch, whose graph is replayed and whose layer stack is run eagerly, each
traced on a time axis of its own. Both begin with the layer stack's first op and end with its last:
filling the buffers, planning attention and the logits come before and after, in either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.graph import (
    BreakableCUDAGraph,
    StepInfo,
    Trace,
    Window,
    describe,
    trace_graph,
    trace_run,
)
from breakgraph.runner import ModelRunner
from breakgraph.runner.graph_runner import GraphRunner
from breakgraph.runner.layer_stack import resolve_layer_stack

STACK = "layer stack"
"""The name of what lies between two mixers of an eager forward."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Inspection:
    """One batch's forward, seen from inside.

    Attributes:
        model: folder name of the checkpoint.
        architecture: as ``config.json`` names it.
        machine: device, type of the activations, torch.
        lengths: tokens of each request.
        bucket: rows of the graph, of which ``sum(lengths)`` are tokens.
        steps: what each step of the graph holds; as many as ``replay`` has, in its order.
        replay: one replay of the graph.
        eager: the same layer stack without a graph; its steps are the mixers that break the
            graph, and ``STACK`` between them.
        capture_bytes: device memory that capturing took; more than the pool's on a GPU, which
            keeps executables too.
        forward_us: a whole forward, from token ids on the host to logits, by graph and eagerly.
        repeats: runs that were timed.
    """

    model: str
    architecture: str
    machine: str
    lengths: tuple[int, ...]
    bucket: int
    steps: tuple[StepInfo, ...]
    replay: Trace
    eager: Trace
    capture_bytes: int
    capture_seconds: float
    forward_us: tuple[float, float]
    repeats: int
    recurrent_breaks: tuple[str, ...] = ()
    """Names of the breaks that ``--linear-attention-capture`` would take into the graph."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padding(self) -> int:
        """Rows of the bucket that are no token's."""
        return self.bucket - self.num_tokens

    @property
    def pool_bytes(self) -> int:
        """What the graph's pool grew by while this graph was captured."""
        return sum(step.grown_bytes for step in self.steps)

    @property
    def asked_bytes(self) -> int:
        """What the segments asked of the pool, one after the other."""
        return sum(step.asked_bytes for step in self.steps)

    @property
    def on_cpu(self) -> bool:
        return self.replay.on_cpu

    @property
    def break_names(self) -> tuple[str, ...]:
        """The kinds of breaks, in order of their first."""
        return tuple(dict.fromkeys(step.name for step in self.steps if step.kind == "break"))


def inspect_forward(runner: ModelRunner, batch: ForwardBatch, repeats: int = 10) -> Inspection:
    """Replay ``batch`` and run it eagerly, both traced.

    Raises:
        ValueError: the batch would not be replayed; the reason says what would change that.
    """
    graph = runner.forward(batch).graph
    if graph is None:
        raise ValueError(f"there is no graph to inspect: {runner.dispatch(batch).describe()}")
    graphs, bucket = _found(runner, graph)
    forward_us = (  # before the profiler: it can slow launches for as long as the process lives
        _time(runner, lambda: runner.forward(batch), repeats),
        _time(runner, lambda: runner.forward(batch, allow_graph=False), repeats),
    )
    graphs.replay_prepare(batch, bucket)
    with forward_context(batch, graphs.attn_backend):
        replay = trace_graph(graph, repeats)
    steps = tuple(describe(graph))
    names = {step.name for step in steps if step.kind == "break"}
    config = runner.model.config
    return Inspection(
        model=Path(runner.args.model_path).resolve().name,
        architecture=(getattr(config, "architectures", None) or [type(runner.model).__name__])[0],
        machine=_machine(runner),
        lengths=tuple(map(int, batch.extend_lens)),
        bucket=bucket,
        steps=steps,
        replay=replay,
        eager=_trace_eager(runner, graphs, batch, names, repeats),
        capture_bytes=graphs.memory_bytes,
        capture_seconds=graphs.capture_seconds,
        forward_us=forward_us,
        repeats=repeats,
        recurrent_breaks=tuple(sorted(name for name in names if name.startswith("RadixLinear"))),
    )


def _found(runner: ModelRunner, graph: BreakableCUDAGraph) -> tuple[GraphRunner, int]:
    return next(
        (graphs, bucket)
        for graphs in runner.graph_runners
        for bucket, known in graphs.graphs.items()
        if known is graph
    )


def _trace_eager(
    runner: ModelRunner, graphs: GraphRunner, batch: ForwardBatch, names: set[str], repeats: int
) -> Trace:
    """The layer stack over the batch's own rows, without padding."""
    stack = resolve_layer_stack(runner.model)[0]
    if stack is None:
        raise ValueError("the model offers no layer stack, so there is nothing to inspect")
    backend = runner.attn_backend
    inputs = graphs.buffers.fill(batch, batch.num_tokens).inputs
    backend.init_forward_metadata(batch)
    mixed: list[Window] = []

    def run() -> list[Window]:
        mixed.clear()
        begin = time.perf_counter_ns()
        backend.begin_layers(inputs)
        stack(inputs)
        return _with_stack(mixed, begin, time.perf_counter_ns())

    with torch.no_grad(), forward_context(batch, backend), _noted(stack, names, mixed):
        return trace_run(run, on_cpu=runner.device.type == "cpu", repeats=repeats)


def _with_stack(mixed: list[Window], begin: int, end: int) -> list[Window]:
    """The mixers' windows, and what lies between them."""
    windows = []
    for window in mixed:
        windows += [Window(STACK, "segment", begin, window.begin_ns), window]
        begin = window.end_ns
    return [*windows, Window(STACK, "segment", begin, end)]


@contextmanager
def _noted(stack: nn.Module, names: set[str], mixed: list[Window]) -> Iterator[None]:
    """Note each call of a method that is a break of that name in the graph.

    The method of the instance hides that of its class, for as long as this lasts.
    """
    hidden: list[tuple[nn.Module, str]] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            result = call(*args, **kwargs)
            mixed.append(Window(name, "break", begin, time.perf_counter_ns()))
            return result

        return noted

    try:
        for module in stack.modules():
            for name in names:
                method = name.rpartition(".")[2]
                plain = getattr(type(module), method, None)
                if getattr(plain, "__qualname__", None) == name:
                    setattr(module, method, noting(name, getattr(module, method)))
                    hidden.append((module, method))
        yield
    finally:
        for module, method in hidden:
            delattr(module, method)


def _time(runner: ModelRunner, call: Callable[[], object], repeats: int) -> float:
    """Microseconds of a call, the device's part included: a median, on a CPU the fastest."""
    times = []
    for _ in range(repeats):
        _synchronize(runner)
        begin = time.perf_counter_ns()
        call()
        _synchronize(runner)
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return min(times) if runner.device.type == "cpu" else statistics.median(times)


def _synchronize(runner: ModelRunner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def _machine(runner: ModelRunner) -> str:
    dtype = str(runner.dtype).removeprefix("torch.")
    if runner.device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    else:
        where = torch.cuda.get_device_name(runner.device)
    return f"{where}, {dtype}, torch {torch.__version__}"
