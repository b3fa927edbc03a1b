"""Pool tensors are held by address, every other tensor strongly; both end with the graph."""

import functools
import gc
import os
import sys
import weakref

import pytest
import torch

from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableGraphError,
    CaptureAudit,
    ForeignReadError,
    TapePool,
    eager_on_graph,
)
from breakgraph.graph.cuda import pool_segments

from .support import (
    SHAPE,
    capture,
    check_replays,
    churn,
    gc_disabled,
    mix,
    mixed,
    poison,
    pool_bytes,
    watch,
)

BIG = (3, 1 << 20)
"""12 MiB: above the sizes for which the CUDA allocator shares one segment."""


def layers(x, count):
    for _ in range(count):
        scratch = (x * 2).relu()
        out = torch.empty_like(scratch)
        mix(scratch, out)
        x = out * 0.1
    return x


def test_each_layer_reuses_the_scratch_of_the_one_before(device):
    x = torch.ones(BIG, device=device)
    shallow, _ = capture(lambda: layers(x, 2), device)
    deep, _ = capture(lambda: layers(x, 10), device)
    assert pool_bytes(deep) == pool_bytes(shallow) < 6 * x.numel() * 4


def test_reused_scratch_replays_right(device):
    check_replays(lambda x: layers(x, 6), device)


def test_pool_tensors_are_not_held(device):
    alive = []
    x = torch.ones(SHAPE, device=device)

    def fn():
        read, given, made = x * 2, x * 3, mixed(x)
        alive.extend(map(watch, (read, given, made)))
        mix(given, torch.empty_like(given))
        return read + made

    with gc_disabled():
        graph, _ = capture(fn, device)
        assert [is_alive() for is_alive in alive] == [False] * 3
    graph.replay()


def test_a_pool_tensor_that_the_caller_keeps_is_not_given_away(device):
    x = torch.ones(SHAPE, device=device)

    def fn():
        kept = x * 2
        mix(x * 5, torch.empty_like(x))
        return kept, [mixed(x * 3) + 1 for _ in range(4)]

    graph, (kept, _) = capture(fn, device)
    x.fill_(7)
    poison(graph)
    graph.replay()
    assert kept.eq(14).all()


def outside_reads(x, outside):
    """Reads ``outside`` in a segment, through a view, and in breaks by position and by name."""
    out = torch.empty_like(x)
    y = x * outside[0] + outside[1].t().t()
    mix(outside[2], out)
    z = mixed(x=outside[3][1:]) if x.shape[0] == 5 else mixed(x=outside[3])
    return y + out + z + ping(outside[4:])


@eager_on_graph()
def ping(pair):
    return pair[0] - pair[1]


def test_outside_tensors_outlive_their_owner(device):
    x = torch.randn(SHAPE, device=device)
    outside = tuple(torch.randn(SHAPE, device=device) for _ in range(6))
    copies = tuple(tensor.clone().cpu() for tensor in outside)
    alive = [watch(tensor) for tensor in outside]
    with gc_disabled():
        graph, out = capture(functools.partial(outside_reads, x, outside), device)
        del outside
        for _ in range(3):
            churn(device)
            x.copy_(torch.randn_like(x))
            graph.replay()
            expected = outside_reads(x.cpu(), copies)
            torch.testing.assert_close(out.cpu(), expected)
        assert [is_alive() for is_alive in alive] == [True] * 6
        graph.reset()
        assert [is_alive() for is_alive in alive] == [False] * 6


def test_a_tensor_made_inside_a_break_is_held(device):
    """It was allocated during the capture, but not from the pool."""
    stash = []

    @eager_on_graph()
    def fill_stash(x):
        stash.append(torch.full(SHAPE, 3.0, device=x.device))

    x = torch.ones(SHAPE, device=device)

    def fn():
        fill_stash(x * 2)
        y = x * stash[0]
        mix(stash[0], torch.empty_like(x))
        return y

    graph, out = capture(fn, device)
    stash.clear()
    churn(device)
    x.fill_(2)
    poison(graph)
    graph.replay()
    assert out.eq(6).all()


CACHE: dict[str, torch.Tensor] = {}


@torch.library.custom_op("breakgraph_tests::cached", mutates_args=())
def cached(x: torch.Tensor) -> torch.Tensor:
    if "table" not in CACHE:
        CACHE["table"] = torch.full_like(x, 3.0)
    return CACHE["table"]


@pytest.mark.gpu
def test_what_an_op_returns_from_its_cache_is_not_taken_for_the_pools():
    x = torch.ones(SHAPE, device="cuda")
    CACHE.clear()
    cached(x)
    graph, out = capture(lambda: cached(x) * x + mixed(cached(x)), "cuda")
    expected = out.clone()
    CACHE.clear()
    churn("cuda")
    poison(graph)
    graph.replay()
    torch.testing.assert_close(out, expected)

    cached(x)
    with pytest.raises(ForeignReadError, match="cached"):
        capture(lambda: cached(x) * x, "cuda", audit=CaptureAudit([x]))


@pytest.mark.gpu
def test_what_an_op_caches_during_the_capture_is_the_pools():
    x = torch.ones(SHAPE, device="cuda")
    CACHE.clear()
    graph, out = capture(lambda: mixed(cached(x) * 1) + cached(x), "cuda", audit=CaptureAudit([x]))
    expected = out.clone()
    poison(graph)
    graph.replay()
    torch.testing.assert_close(out, expected)
    CACHE.clear()


def test_graphs_of_descending_sizes_share_one_pool(device):
    sizes = (8, 5, 2, 1)
    x = torch.ones(sizes[0], 1 << (20 if device == "cuda" else 12), device=device)
    shared, graphs = torch.zeros_like(x), {}
    pool = TapePool() if device == "cpu" else torch.cuda.graph_pool_handle()
    for size in sizes:

        def fn(size=size):
            shared[:size].copy_(layers(x[:size] + size, 2))

        graphs[size], _ = capture(fn, device, pool=pool)
        if size == sizes[0]:
            alone = pool_bytes(graphs[size])
    assert pool_bytes(graphs[1]) == alone
    for size in (1, 8, 2, 2, 5, 8, 1):
        x.copy_(torch.rand_like(x) - 0.3)
        shared.zero_()
        poison(graphs[size])
        graphs[size].replay()
        torch.testing.assert_close(shared[:size], layers(x[:size] + size, 2))
        assert not shared[size:].any()


def test_a_graph_reads_another_ones_output_in_their_pool(device):
    x = torch.ones(SHAPE, device=device)
    first, doubled = capture(lambda: mixed(x * 2), device)
    second, out = capture(lambda read=doubled: mixed(read + 1) * 2, device, pool=first.pool())
    expected = out.clone()
    del doubled
    first.replay()
    second.replay()
    torch.testing.assert_close(out, expected)
    assert second.pool() == first.pool()


def test_two_graphs_of_their_own_pools_do_not_meet(device):
    x, y = torch.ones(SHAPE, device=device), torch.ones(SHAPE, device=device)
    first, one = capture(lambda: mixed(x * 2) + 1, device)
    second, two = capture(lambda: mixed(y * 3) + 1, device)
    x.fill_(2), y.fill_(5)
    first.replay(), second.replay()
    expected = mixed(x * 2) + 1
    poison(second)
    torch.testing.assert_close(one, expected)
    second.replay()
    torch.testing.assert_close(two, mixed(y * 3) + 1)
    torch.testing.assert_close(one, expected)


def test_a_dropped_graph_dies_without_the_garbage_collector(device):
    x = torch.ones(SHAPE, device=device)
    capture(lambda: mixed(x), device)  # torch's own first call leaves cycles
    outside = torch.ones(SHAPE, device=device)
    alive = watch(outside)
    with gc_disabled():
        graph, out = capture(lambda t=outside: layers(x, 3) + t + mixed(x=t) + ping((x, t)), device)
        graph.replay()
        segments = [weakref.ref(step.segment) for step in graph.steps if step.segment]
        graph_dies = weakref.ref(graph)
        pool = weakref.ref(graph.pool()) if device == "cpu" else lambda: None
        del outside, graph, out
        assert graph_dies() is None and pool() is None
        assert {segment() for segment in segments} == {None}
        assert not alive()


def test_memory_stays_where_it_was_over_200_captures(device):
    x = torch.ones((16, 64) if device == "cpu" else BIG, device=device)

    def capture_and_drop(times):
        for _ in range(times):
            outside = torch.ones_like(x)
            graph, _ = capture(lambda: layers(x, 1) + mixed(x=outside), device)  # noqa: B023
            graph.replay()

    with gc_disabled():
        capture_and_drop(100)  # until Python's own free lists are full
        before = memory_in_use(device)
        capture_and_drop(200)
        after = memory_in_use(device)
    if device == "cpu":
        assert after[0] - before[0] < 200, "at least one Python object a capture stays behind"
    else:
        assert after[0] == before[0]
        if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1":  # else others use the GPU too
            assert before[1] - after[1] <= 4 << 20


def memory_in_use(device):
    """Python's blocks on CPU; bytes reserved by torch and bytes free on a GPU."""
    gc.collect()
    if device == "cpu":
        return (sys.getallocatedblocks(),)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]


def test_a_replay_writes_to_nobody_elses_memory(device):
    """Landings and scratch that the captured code dropped are still the pool's."""
    x = torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: [mixed(mixed(x * n) + n) for n in range(4)][-1] * 2, device)
    others = [torch.zeros(SHAPE, device=device) for _ in range(512)]
    graph.replay()
    assert not any(other.any() for other in others)
    torch.testing.assert_close(out, mixed(mixed(x * 3) + 3) * 2)


def test_reset_gives_the_memory_back(device):
    x = torch.ones(BIG, device=device)
    graph = BreakableCUDAGraph()

    before = memory_in_use(device)
    _, out = capture(lambda: layers(x, 2), device, graph)
    del out
    if device == "cpu":
        pool = weakref.ref(graph.pool())
        graph.reset()
        assert pool() is None
    else:
        assert memory_in_use(device)[0] > before[0]
        graph.reset()
        assert memory_in_use(device)[0] == before[0]


@pytest.mark.gpu
def test_a_mem_pool_serves_graphs():
    pool = torch.cuda.MemPool()
    x = torch.ones(SHAPE, device="cuda")
    captured = [capture(lambda: layers(x, 2), "cuda", pool=pool.id) for _ in range(3)]
    for graph, out in captured:
        graph.replay()
        torch.testing.assert_close(out, layers(x, 2))
        assert graph.pool() == pool.id and pool_bytes(graph)
    del captured, graph, out  # a MemPool may not die before what is in it


@pytest.mark.gpu
@pytest.mark.parametrize("keep_output", [False, True])
def test_a_pool_handle_whose_graphs_are_gone(keep_output):
    """The allocator may have closed the pool: it serves again, or the error says what to do."""
    pool = torch.cuda.graph_pool_handle()
    x = torch.ones(SHAPE, device="cuda")
    graph, out = capture(lambda: layers(x, 2), "cuda", pool=pool)
    if not keep_output:
        del out
    graph.reset()
    try:
        graph, again = capture(lambda: layers(x, 2), "cuda", pool=pool)
    except BreakableGraphError as error:
        assert "graph_pool_handle" in str(error)
        torch.rand(3, device="cuda")
        graph, again = capture(lambda: layers(x, 2), "cuda")
    graph.replay()
    torch.testing.assert_close(again, layers(x, 2))


def test_a_break_may_not_keep_pool_memory_from_reuse_by_its_closure(device):
    """What a break's frozen arguments point to is an address, not an owner."""
    x = torch.ones(BIG, device=device)

    def fn(count):
        y = x * 1
        for _ in range(count):
            y = ping((y, y * 0.5)) * 1
        return y

    few, many = capture(lambda: fn(2), device)[0], capture(lambda: fn(8), device)[0]
    assert pool_bytes(few) == pool_bytes(many)


@pytest.mark.gpu
def test_pool_ids_survive_being_looked_up():
    """torch 2.11 drops references to the parts of an id; past 256 that frees them."""
    while (pool := torch.cuda.graph_pool_handle())[1] <= 256:
        pass
    references = [sys.getrefcount(part) for part in pool]
    for _ in range(5):
        assert pool_segments(pool) == []
    now = [sys.getrefcount(part) for part in pool]
    assert all(after >= before for before, after in zip(references, now, strict=True))
    for _ in range(20):
        assert (0, pool[1]) == pool and pool_segments(pool) == []
