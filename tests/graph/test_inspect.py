"""What a graph holds and where its time goes."""

import pytest
import torch

from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableGraphError,
    StepInfo,
    StepTiming,
    describe,
    eager_on_graph,
    format_table,
    is_in_breakable_cuda_graph,
    time_steps,
)

from .support import SHAPE, capture, mixed, pool_bytes


def test_steps_are_described_in_replay_order(device):
    x = torch.ones(SHAPE, device=device)
    graph, _ = capture(lambda: mixed((x * 2).relu()) + 1, device)
    infos = describe(graph)
    assert [(info.name, info.kind, info.nodes) for info in infos] == [
        ("segment 0", "segment", 2),
        ("mixed", "break", 0),
        ("segment 1", "segment", 1),
    ]
    assert [len(info.op_names) for info in infos] == [2, 0, 1]
    if device == "cpu":
        assert infos[0].op_names == ("aten.mul.Tensor", "aten.relu.default")
    else:
        assert all("elementwise" in name for name in infos[0].op_names)


def test_timing_replays_every_step_as_a_replay_does(device):
    seen = []

    @eager_on_graph()
    def note(x):
        seen.append((is_in_breakable_cuda_graph(), torch.is_grad_enabled()))
        return x.cumsum(0)

    x, counter = torch.ones(SHAPE, device=device), torch.zeros((), device=device)

    def fn():
        counter.add_(1)
        return note(x * 2) + 1

    graph, out = capture(fn, device)
    x.fill_(2)
    timings = time_steps(graph, repeats=5)
    assert [timing.kind for timing in timings] == ["segment", "break", "segment"]
    assert all(timing.host_us > 0 and timing.device_us > 0 for timing in timings)
    if device == "cpu":
        assert all(timing.host_us == timing.device_us for timing in timings)
    assert counter.item() == 6 and seen == [(True, False)] * 6
    assert out[-1].eq(4 * SHAPE[0] + 1).all() and torch.is_grad_enabled()


@pytest.mark.gpu
def test_device_time_is_the_devices():
    a = torch.randn(4096, 4096, device="cuda")
    graph, _ = capture(lambda: mixed((a @ a)[:4]) + 1, "cuda")
    matmul = time_steps(graph)[0]
    assert matmul.device_us > 100 > matmul.host_us


def test_a_graph_without_steps_or_captures(device):
    graph, _ = capture(lambda: None, device)
    assert describe(graph) == time_steps(graph) == []
    for look in (describe, time_steps):
        with pytest.raises(BreakableGraphError, match="nothing is captured"):
            look(BreakableCUDAGraph())
    with pytest.raises(BreakableGraphError, match="repeats"):
        time_steps(graph, repeats=0)


INFOS = [
    StepInfo(
        name="segment 0",
        kind="segment",
        nodes=14,
        op_names=("mul",) * 10 + ("a" * 60, "add", "sub", "div"),
    ),
    StepInfo(name="Attention.mix", kind="break", nodes=0, op_names=()),
]
TIMINGS = [
    StepTiming(name="segment 0", kind="segment", host_us=1.94, device_us=10.0),
    StepTiming(name="Attention.mix", kind="break", host_us=112.06, device_us=5.5),
]


def test_the_table_is_aligned_and_totalled():
    assert format_table(INFOS, TIMINGS).splitlines() == [
        "step           kind     nodes  host µs  device µs  ops",
        f"segment 0      segment     14      1.9       10.0  mul ×10, {'a' * 47}…, add, 2 more",
        "Attention.mix  break        0    112.1        5.5",
        "total                      14    114.0       15.5",
    ]


def test_the_table_does_without_times():
    lines = format_table(INFOS).splitlines()
    assert lines[0] == "step           kind     nodes  ops"
    assert lines[-1] == "total                      14"


def test_a_segment_counts_what_it_asked_of_the_pool_and_what_was_new(device):
    x = torch.ones(64, 128, device=device)  # 32 KiB each

    def fn():
        y = (x * 2).relu()  # the product's memory is free from here on
        return mixed(y * 3) + 1

    graph, _ = capture(fn, device)
    first, _, second = describe(graph)
    block = 64 * 128 * 4
    assert (first.asked_bytes, second.asked_bytes) == (3 * block, 2 * block)  # with the landing
    assert sum(info.grown_bytes for info in describe(graph)) == pool_bytes(graph)
    if device == "cpu":
        assert first.grown_bytes == 2 * block
    other, _ = capture(fn, device, pool=graph.pool())
    assert other.pool() == graph.pool()
    assert describe(other)[0].asked_bytes == 3 * block
