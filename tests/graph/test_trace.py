"""A replay on a time axis: each op in its step, in order, on one clock."""

import pytest
import torch

from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableGraphError,
    OpSpan,
    StepTrace,
    Trace,
    Window,
    describe,
    trace_graph,
    trace_run,
)
from breakgraph.graph.trace import SYNC, Event, busy_us, fastest_windows, place

from .support import SHAPE, capture, mixed


def test_a_trace_has_the_steps_of_the_graph_in_order(device):
    x = torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: mixed((x * 2).relu()) + 1, device)
    x.fill_(3)
    trace = trace_graph(graph, repeats=3)
    infos = describe(graph)
    assert [(s.name, s.kind) for s in trace.steps] == [(i.name, i.kind) for i in infos]
    assert trace.steps[0].host_start_us == 0 and trace.on_cpu == (device == "cpu")
    ends = [t for step in trace.steps for t in (step.host_start_us, step.host_end_us)]
    assert ends == sorted(ends)
    assert [len(s.ops) for s in trace.steps if s.kind == "segment"] == [2, 1]
    ops = [op for step in trace.steps for op in step.ops]
    assert all(op.us > 0 for op in ops)
    assert [op.start_us for op in ops] == sorted(op.start_us for op in ops)
    assert 0 < trace.busy_us <= trace.end_us
    torch.testing.assert_close(out, mixed((x * 2).relu()) + 1)


def test_on_the_cpu_ops_lie_within_their_steps_and_bear_their_names():
    x = torch.ones(SHAPE)
    graph, _ = capture(lambda: mixed((x * 2).relu()) + 1, "cpu")
    trace = trace_graph(graph, repeats=2)
    first = trace.steps[0]
    assert [op.name for op in first.ops] == ["aten.mul.Tensor", "aten.relu.default"]
    for step in trace.steps:
        for op in step.ops:
            assert step.host_start_us <= op.start_us <= op.end_us <= step.host_end_us
        assert trace.device_us(step) == pytest.approx(step.host_us)
    assert trace.wall_us == trace.end_us


def test_nothing_captured_and_no_repeats_are_refused(device):
    with pytest.raises(BreakableGraphError, match="nothing is captured"):
        trace_graph(BreakableCUDAGraph())
    graph, _ = capture(lambda: None, device)
    assert trace_graph(graph).steps == () and trace_graph(graph).end_us == 0
    with pytest.raises(BreakableGraphError, match="repeats"):
        trace_graph(graph, repeats=0)


def test_the_fastest_are_laid_end_to_end_and_a_stop_in_one_run_is_gone():
    def run(zero, stop):
        ops = (("mul", zero + 10, zero + 30), ("add", zero + 30 + stop, zero + 40 + stop))
        return [
            Window("segment 0", "segment", zero, zero + 50 + stop, ops),
            Window("mix", "break", zero + 52 + stop, zero + 90 + stop),
        ]

    assert fastest_windows([run(1000, 0), run(5000, 9000), run(20000, 0)]) == [
        Window("segment 0", "segment", 0, 50, (("mul", 10, 30), ("add", 30, 40))),
        Window("mix", "break", 52, 90),
    ]
    with pytest.raises(BreakableGraphError, match="other steps"):
        fastest_windows([run(0, 0), run(0, 0)[:1]])


def test_time_covered_twice_counts_once():
    assert busy_us([OpSpan("a", 0, 10), OpSpan("b", 5, 12), OpSpan("c", 6, 8)]) == 12
    assert busy_us([OpSpan("a", 4, 5), OpSpan("b", 0, 1)]) == 2
    assert busy_us([]) == 0


# The profiler's clock is 700 µs ahead of the host's; a first run ends before the syncs.
AHEAD = 700.0
WINDOWS = [
    Window("segment 0", "segment", 10_000, 12_000),
    Window("mix", "break", 12_000, 60_000),
    Window("segment 1", "segment", 60_000, 62_000),
]
SYNCS = [(1_000, 9_000), (9_200, 9_800)]
CALLS = [
    Event("cudaGraphLaunch", 1, AHEAD - 50, AHEAD - 48),
    Event(SYNC, 9, AHEAD - 46, AHEAD - 41),  # of a break of the first run
    Event("cudaDeviceSynchronize", 10, AHEAD - 30, AHEAD - 20),
    Event(SYNC, 2, AHEAD + 4, AHEAD + 4.2),
    Event(SYNC, 3, AHEAD + 9.25, AHEAD + 9.75),
    Event("cudaGraphLaunch", 4, AHEAD + 10.2, AHEAD + 11.9),
    Event("cudaLaunchKernel", 5, AHEAD + 30, AHEAD + 33),
    Event("cudaMemcpyAsync", 6, AHEAD + 50, AHEAD + 53),
    Event("cudaGraphLaunch", 7, AHEAD + 59.9, AHEAD + 61.5),  # the clocks differ a little
    Event("cudaDeviceSynchronize", 8, AHEAD + 63, AHEAD + 90),
]
KERNELS = [
    Event("old", 1, AHEAD - 40, AHEAD - 30),
    Event("gemm", 4, AHEAD + 14, AHEAD + 20),
    Event("norm", 4, AHEAD + 20, AHEAD + 22),
    Event("flash", 5, AHEAD + 34, AHEAD + 44),
    Event("copy", 6, AHEAD + 54, AHEAD + 80),
    Event("gemm", 7, AHEAD + 80, AHEAD + 88),
]


def names(steps):
    return [[op.name for op in step.ops] for step in steps]


def test_a_kernel_belongs_to_the_step_that_launched_it():
    steps = place(WINDOWS, SYNCS, CALLS, KERNELS[::-1])
    assert names(steps) == [["gemm", "norm"], ["flash", "copy"], ["gemm"]]
    first = steps[0].ops[0]
    assert (first.start_us, first.end_us) == pytest.approx((4, 10))
    assert [step.host_start_us for step in steps] == [0, 2, 50]
    trace = Trace(steps=steps, on_cpu=False, wall_us=80)
    assert trace.end_us == pytest.approx(78)
    assert trace.device_us(steps[1]) == pytest.approx(36)
    assert trace.busy_us == pytest.approx(52)


def test_a_kernel_without_its_call_goes_with_the_one_before_it():
    calls = [call for call in CALLS if call.id != 6]
    assert names(place(WINDOWS, SYNCS, calls, KERNELS)) == [
        ["gemm", "norm"],
        ["flash", "copy"],
        ["gemm"],
    ]


def test_without_the_syncs_the_second_half_of_the_launches_is_the_run():
    launches = [call for call in CALLS if call.id in (4, 5, 6, 7)]
    before = [Event(c.name, c.id + 10, c.start_us - 100, c.end_us - 100) for c in launches]
    kernels = [k for k in KERNELS if k.id != 1]
    earlier = [Event(k.name, k.id + 10, k.start_us - 100, k.end_us - 100) for k in kernels]
    steps = place(WINDOWS, SYNCS, [*before, *launches], [*earlier, *kernels])
    assert names(steps) == [["gemm", "norm"], ["flash", "copy"], ["gemm"]]


def test_kernels_whose_calls_were_not_seen_are_not_guessed_at():
    syncs = [call for call in CALLS if call.name == SYNC]
    with pytest.raises(BreakableGraphError, match="none of the calls"):
        place(WINDOWS, SYNCS, syncs, KERNELS)


def test_no_windows_and_no_kernels():
    assert place([], SYNCS, CALLS, KERNELS) == ()
    assert names(place(WINDOWS, SYNCS, CALLS, [])) == names(place(WINDOWS, SYNCS, [], []))
    step = place(WINDOWS, [], [], [])[1]
    assert step == StepTrace(name="mix", kind="break", host_start_us=2, host_end_us=50)


@pytest.mark.gpu
def test_kernels_on_a_gpu_are_told_apart_by_step():
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    graph, _ = capture(lambda: mixed((a @ a).relu()[:4]) + 1, "cuda")
    trace = trace_graph(graph, repeats=3)
    first, middle, last = trace.steps
    assert len(first.ops) == 2 and "elementwise" in first.ops[1].name.lower()
    assert any("scan" in op.name.lower() or "cumsum" in op.name.lower() for op in middle.ops)
    assert len(last.ops) == 1
    for step in trace.steps:
        assert all(op.start_us > step.host_start_us for op in step.ops)
    assert first.ops[-1].end_us <= middle.ops[0].start_us <= last.ops[0].start_us


@pytest.mark.gpu
def test_an_eager_run_on_a_gpu_is_traced_by_its_windows():
    import time

    a = torch.randn(512, 512, device="cuda")

    def run():
        marks = [time.perf_counter_ns()]
        for call in (a.relu, a.exp):
            call()
            marks.append(time.perf_counter_ns())
        return [Window("relu", "segment", *marks[:2]), Window("exp", "break", *marks[1:])]

    trace = trace_run(run, on_cpu=False, repeats=3)
    assert [len(step.ops) for step in trace.steps] == [1, 1]
