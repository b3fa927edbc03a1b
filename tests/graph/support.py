"""Toys and probes for the graph tests."""

import contextlib
import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    TapePool,
    eager_on_graph,
)
from breakgraph.graph.cuda import pool_segments

SHAPE = (4, 8)


@eager_on_graph()
def mix(x, out):
    """A break that no segment could hold: its result depends on a count read on the host."""
    out.copy_(x.cumsum(0) * (1 + int((x > 0).sum())))


@eager_on_graph()
def mixed(x):
    """The same, returning fresh memory."""
    return x.cumsum(0) * (1 + int((x > 0).sum()))


def capture(fn, device, graph=None, **options):
    """``fn()`` captured: the graph and what ``fn`` returned."""
    graph = BreakableCUDAGraph() if graph is None else graph
    with BreakableCUDAGraphCapture(graph, device=device, **options):
        out = fn()
    return graph, out


def check_replays(fn, device, shape=SHAPE, **options):
    """Capture ``fn(x)``; replays on new inputs, over a poisoned pool, equal eager calls."""
    x = torch.randn(shape, device=device)
    graph, out = capture(lambda: fn(x), device, **options)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        expected = fn(x.clone())
        poison(graph)
        graph.replay()
        torch.testing.assert_close(out, expected)
    return graph


def poison(graph):
    """NaN over all the memory of the graph's pool."""
    pool = graph.pool()
    if isinstance(pool, TapePool):
        pool.poison()
        return
    torch.cuda.synchronize()
    for segment in pool_segments(pool):
        where = torch.device("cuda", segment["device"])
        storage = torch._C._construct_storage_from_data_pointer(
            segment["address"], where, segment["total_size"]
        )
        torch.empty(0, dtype=torch.uint8, device=where).set_(storage).fill_(0xFF)
    torch.cuda.synchronize()


def pool_bytes(graph):
    pool = graph.pool()
    if isinstance(pool, TapePool):
        return pool.num_bytes
    return sum(segment["total_size"] for segment in pool_segments(pool))


def churn(device, *shapes):
    """Allocate over whatever was freed, and fill it with NaN."""
    for _ in range(3):
        junk = [
            torch.full(shape, float("nan"), device=device)
            for shape in (SHAPE, *shapes)
            for _ in range(64)
        ]
        del junk
    if device == "cuda":
        torch.cuda.synchronize()


def watch(tensor):
    """Whether ``tensor``'s memory is still somebody's, to be asked later."""
    reference = StorageWeakRef(tensor.untyped_storage())
    return lambda: not reference.expired()


@contextlib.contextmanager
def gc_disabled():
    """What dies in here dies by reference counts alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
