"""A failed capture leaves everything as it was, shows the first error, and can be repeated."""

import contextlib
import gc
import threading

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import breakgraph.graph.cuda
from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    BreakableGraphError,
    RefusedOpError,
    break_graph,
    eager_on_graph,
    is_in_breakable_cuda_graph,
)

from .support import SHAPE, capture, check_replays, gc_disabled, mixed, pool_bytes, watch


class Boom(Exception):
    pass


@eager_on_graph()
def exploding(x):
    raise Boom("in a break")


def in_the_first_segment(x):
    y = x * 2
    raise Boom(y.shape)


def in_a_later_segment(x):
    y = mixed(mixed(x * 2) + 1) * 2
    raise Boom(y.shape)


def in_a_break(x):
    return exploding(mixed(x * 2) * 2)


def in_a_first_break(x):
    return exploding(x)


def at_a_refused_op(x):
    return (mixed(x * 2) * 2).sum().item()


def at_a_refused_argument(x):
    return mixed([x])


def swallowed(x):
    with contextlib.suppress(Boom):
        exploding(x * 2)
    return mixed(x * 3) + 1


def state(device):
    stream = torch.cuda.current_stream() if device == "cuda" else None
    return (
        stream,
        gc.isenabled(),
        is_in_breakable_cuda_graph(),
        torch.is_grad_enabled(),
        torch.cuda.Event.wait,
        _get_current_dispatch_mode_stack(),
        [vars(torch.Tensor).get(name) for name in ("tolist", "numpy", "__array__", "__repr__")],
    )


FAILURES = [
    (in_the_first_segment, Boom),
    (in_a_later_segment, Boom),
    (in_a_break, Boom),
    (in_a_first_break, Boom),
    (at_a_refused_op, RefusedOpError),
    (at_a_refused_argument, TypeError),
    (swallowed, BreakableGraphError),
]


@pytest.mark.parametrize(("fn", "error"), FAILURES)
def test_a_failed_capture_restores_everything_and_can_be_repeated(fn, error, device):
    x = torch.randn(SHAPE, device=device)
    graph = BreakableCUDAGraph()
    for _ in range(3):
        before = state(device)
        with pytest.raises(error) as raised:
            capture(lambda: fn(x), device, graph)
        assert isinstance(raised.value, error)
        assert state(device) == before
        with pytest.raises(BreakableGraphError, match="nothing is captured"):
            graph.replay()
    if device == "cuda":
        torch.rand(3, device=device)
        torch.cuda.synchronize()
    check_replays(lambda x: mixed(x * 2) + 1, device, graph=graph)


@pytest.mark.parametrize(("fn", "error"), FAILURES)
def test_a_failed_capture_gives_its_memory_back(fn, error, device):
    x = torch.ones((3, 1 << 20) if device == "cuda" else SHAPE, device=device)
    alive = []

    def attempt():
        outside = torch.ones_like(x)
        alive[:] = [watch(outside)]

        def watched(x):
            y = mixed(x + outside) * 2
            alive.append(watch(y))
            return fn(y)

        with contextlib.suppress(error):
            capture(lambda: watched(x), device)

    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    attempt()
    before = reserved() if device == "cuda" else 0
    with gc_disabled():
        attempt()
        assert not any(is_alive() for is_alive in alive) and len(alive) == 2
    if device == "cuda":
        assert reserved() == before


def test_a_failure_in_place_of_a_capture_empties_the_graph(device):
    x = torch.ones(SHAPE, device=device)
    graph, _ = capture(lambda: mixed(x * 2), device)
    with pytest.raises(Boom):
        capture(lambda: in_a_later_segment(x), device, graph)
    assert graph.steps == () and graph.num_breaks == 0


def test_a_swallowed_break_exception_is_the_cause_of_the_error(device):
    x = torch.ones(SHAPE, device=device)
    with pytest.raises(BreakableGraphError, match="went on") as raised:
        capture(lambda: swallowed(x), device)
    assert isinstance(raised.value.__cause__, Boom)


def test_an_exception_caught_inside_a_break_is_no_failure(device):
    @eager_on_graph()
    def careful(x):
        with contextlib.suppress(Boom):
            exploding(x)
        return x.cumsum(0)

    check_replays(lambda x: careful(x * 2) + 1, device)


def test_a_keyboard_interrupt_ends_the_capture_too(device):
    def interrupted(x):
        mixed(x * 2)
        raise KeyboardInterrupt

    x = torch.ones(SHAPE, device=device)
    graph = BreakableCUDAGraph()
    with pytest.raises(KeyboardInterrupt):
        capture(lambda: interrupted(x), device, graph)
    check_replays(lambda x: mixed(x * 2) + 1, device, graph=graph)


def test_garbage_collection_is_off_during_a_capture_alone(device):
    seen = []
    x = torch.ones(SHAPE, device=device)

    def fn():
        seen.append(gc.isenabled())
        break_graph()
        return x * 2

    assert gc.isenabled()
    capture(fn, device)
    assert seen == [False] and gc.isenabled()
    gc.disable()
    try:
        capture(fn, device)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_garbage_collection_stays_off_until_the_last_of_two_threads_is_done():
    inside, first_is_out = threading.Barrier(2), threading.Event()
    seen = {}

    def slow():
        with BreakableCUDAGraphCapture(BreakableCUDAGraph(), device="cpu"):
            inside.wait(10)
            first_is_out.wait(10)
            seen["slow"] = gc.isenabled()

    thread = threading.Thread(target=slow)
    thread.start()
    with BreakableCUDAGraphCapture(BreakableCUDAGraph(), device="cpu"):
        inside.wait(10)
    seen["between"] = gc.isenabled()
    first_is_out.set()
    thread.join(10)
    assert seen == {"between": False, "slow": False} and gc.isenabled()


def test_rocm_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(BreakableGraphError, match=r"NVIDIA.*ROCm.*Run without"):
        capture(lambda: None, "cuda:0")


def test_a_missing_cuda_python_is_said_with_the_pip_command(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(breakgraph.graph.cuda.importlib, "import_module", missing)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BreakableGraphError, match=r"pip install 'cuda-python>=13.0,<14'"):
        capture(lambda: None, "cuda:0")
    assert not is_in_breakable_cuda_graph() and gc.isenabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(BreakableGraphError, match="no CUDA device"):
        capture(lambda: None, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize("sync", [lambda y: y.to("cpu"), lambda y: torch.cuda.synchronize()])
def test_a_cuda_error_in_a_segment_is_the_one_shown(place, sync):
    """A device-wide wait invalidates the stream capture, so ending it fails as well."""
    x = torch.randn(1 << 20, device="cuda")
    graph = BreakableCUDAGraph()

    def invalid():
        y = x * 2 if place == "first" else mixed(x * 2) * 2
        return sync(y)

    for _ in range(3):
        before = torch.cuda.current_stream()
        with pytest.raises(RuntimeError, match="captur"):
            capture(invalid, "cuda", graph)
        assert torch.cuda.current_stream() == before
        torch.rand(3, device="cuda")
    torch.cuda.synchronize()
    check_replays(lambda x: torch.nn.functional.dropout(x, 0.0) * 2, "cuda", graph=graph)


@pytest.mark.gpu
def test_a_cuda_error_in_a_segment_gives_its_memory_back():
    x = torch.ones((3, 1 << 20), device="cuda")

    def attempt():
        with pytest.raises(RuntimeError, match="captur"):
            capture(lambda: (mixed(x * 2) * 2, torch.cuda.synchronize()), "cuda")
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    assert attempt() == attempt() == attempt()


@pytest.mark.gpu
def test_a_swallowed_cuda_error_is_an_error_at_the_end():
    x = torch.randn(SHAPE, device="cuda")

    def invalid():
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return x

    with pytest.raises(BreakableGraphError, match="swallowed"):
        capture(invalid, "cuda")
    torch.rand(3, device="cuda")
    check_replays(lambda x: mixed(x * 2) + 1, "cuda")


@pytest.mark.gpu
def test_an_error_on_another_stream_leaves_no_capture_open():
    x = torch.randn(SHAPE, device="cuda")
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()

    def astray():
        x * 2
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(side)
        raise Boom

    try:
        with pytest.raises(Boom):
            capture(astray, "cuda")
        assert torch.cuda.current_stream() == main
    finally:
        torch.cuda.set_stream(main)
    check_replays(lambda x: mixed(x * 2) + 1, "cuda")


@pytest.mark.gpu
def test_a_capture_inside_a_plain_cuda_graph_is_refused():
    x = torch.randn(SHAPE, device="cuda")
    plain = torch.cuda.CUDAGraph()
    with torch.cuda.graph(plain):
        y = x * 2
        with pytest.raises(BreakableGraphError, match="do not nest"):
            capture(lambda: x * 3, "cuda")
    x.fill_(1)
    plain.replay()
    assert y.eq(2).all()
    check_replays(lambda x: mixed(x * 2) + 1, "cuda")


@pytest.mark.gpu
def test_the_first_matrix_product_of_a_thread_may_be_captured():
    """Its cuBLAS handle and workspace are made before the capture, outside its pool."""
    results = []

    def work():
        x = torch.randn(64, 64, device="cuda")
        graph, out = capture(lambda: x @ x, "cuda")
        results.append((pool_bytes(graph), (out - x @ x).abs().max().item()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    [(taken, difference)] = results
    assert taken <= 2 << 20 and difference < 1e-3


def test_a_capture_that_has_not_begun_has_no_segments(device):
    assert BreakableCUDAGraphCapture(BreakableCUDAGraph(), device=device).num_segments == 0
