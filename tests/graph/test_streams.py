"""Streams: side streams join before a break; two threads capture at once; any stream replays."""

import threading

import pytest
import torch
import torch.nn.functional as F

from breakgraph.graph import (
    BreakableCUDAGraph,
    BreakableCUDAGraphCapture,
    UnjoinedStreamError,
    break_graph,
)
from breakgraph.graph.cuda import unjoined_nodes

from .support import SHAPE, capture, check_replays, mixed


@pytest.mark.parametrize(
    ("nodes", "sources", "main", "unjoined"),
    [
        ([], [], set(), set()),
        ([1], [], {1}, set()),
        ([1, 2], [1], {2}, set()),
        ([1, 2, 3], [1, 1], {2}, {3}),
        ([1, 2, 3, 4], [1, 1, 2, 3], {4}, set()),
        ([1, 2, 3], [], {1}, {2, 3}),
        ([1, 2, 3], [1, 1], {2, 3}, set()),
    ],
)
def test_unjoined_nodes_are_the_leaves_off_the_main_stream(nodes, sources, main, unjoined):
    assert unjoined_nodes(nodes, sources, main) == unjoined


def test_two_threads_capture_at_once(device):
    together, results, errors = threading.Barrier(2), {}, []

    def work(factor):
        try:
            if device == "cuda":
                torch.cuda.set_stream(torch.cuda.Stream())
            x = torch.ones(SHAPE, device=device)

            def fn():
                y = x * factor
                for _ in range(20):
                    together.wait(20)
                    y = mixed(y * 0.01) + factor
                return y

            with torch.no_grad():
                graph, out = capture(fn, device)
                x.fill_(factor)
                together.wait(20)
                for _ in range(10):
                    graph.replay()
                results[factor] = out.cpu()
                assert graph.num_breaks == 20
        except BaseException as error:
            together.abort()
            errors.append(error)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    for factor, result in results.items():
        y = torch.full(SHAPE, float(factor)) * factor
        for _ in range(20):
            y = mixed(y * 0.01) + factor
        torch.testing.assert_close(result, y)


gpu = pytest.mark.gpu


def on(side, fn, join=True):
    """``fn()`` on ``side``, forked from the current stream and joined to it."""
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = fn()
    if join:
        main.wait_stream(side)
    return result


@gpu
def test_a_stream_may_fork_and_join_in_each_segment():
    side, other = torch.cuda.Stream(), torch.cuda.Stream()

    def fn(x):
        for _ in range(3):
            y = x * 2
            a, b = on(side, lambda: y + 1), on(other, lambda: y.sin() + on(side, y.cos))  # noqa: B023
            x = mixed((a + b) * 0.1)
        return x + on(side, lambda: x * 2)

    assert check_replays(fn, "cuda").num_breaks == 3


@gpu
def test_events_fork_and_join_too():
    side = torch.cuda.Stream()

    def fn(x):
        y = x * 2
        fork, join = torch.cuda.Event(), torch.cuda.Event()
        fork.record()
        side.wait_event(fork)
        with torch.cuda.stream(side):
            z = y + 1
            join.record()
        join.wait()
        return mixed(z + y) + 1

    check_replays(fn, "cuda")


@gpu
def test_a_fork_without_work_needs_no_join():
    side = torch.cuda.Stream()

    def fn(x):
        y = x * 2
        side.wait_stream(torch.cuda.current_stream())
        return mixed(y) + 1

    check_replays(fn, "cuda")


@gpu
@pytest.mark.parametrize("end", ["break", "exit"])
def test_an_unjoined_stream_is_an_error_naming_the_fork(end):
    side = torch.cuda.Stream()
    x = torch.ones(SHAPE, device="cuda")
    graph = BreakableCUDAGraph()

    def fn():
        y = mixed(x * 2)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = y + 1
        if end == "break":
            break_graph()
        return z

    for _ in range(2):
        with pytest.raises(UnjoinedStreamError, match=r"test_streams\.py:\d+ in fn.*wait_stream"):
            capture(fn, "cuda", graph)
        torch.rand(3, device="cuda")
    line = fn.__code__.co_firstlineno + 2
    with pytest.raises(UnjoinedStreamError, match=rf"test_streams\.py:{line} in fn"):
        capture(fn, "cuda", graph)
    check_replays(lambda x: on(side, lambda: x * 2), "cuda", graph=graph)


@gpu
def test_work_of_a_joined_stream_after_its_join_is_unjoined():
    side = torch.cuda.Stream()
    x = torch.ones(SHAPE, device="cuda")

    def fn():
        y = on(side, lambda: x * 2)
        with torch.cuda.stream(side):
            z = x + 1
        return mixed(y), z

    with pytest.raises(UnjoinedStreamError):
        capture(fn, "cuda")


@gpu
@pytest.mark.parametrize("join", [False, True])
def test_a_stream_that_was_not_forked_in_this_segment_is_an_error(join):
    """CUDA would run its work once, at capture, and never again."""
    side = torch.cuda.Stream()
    x = torch.ones(SHAPE, device="cuda")

    def fn():
        y = mixed(on(side, lambda: x * 2))
        with torch.cuda.stream(side):
            z = y + 1
        if join:
            torch.cuda.current_stream().wait_stream(side)
        return y + z

    with pytest.raises(UnjoinedStreamError, match=r"test_streams\.py.*wait_stream"):
        capture(fn, "cuda")
    check_replays(lambda x: mixed(x * 2) + 1, "cuda")


@gpu
def test_a_break_may_use_streams_as_it_likes():
    side = torch.cuda.Stream()

    def fn(x):
        return mixed_aside(x * 2) + 1

    from breakgraph.graph import eager_on_graph

    @eager_on_graph()
    def mixed_aside(x):
        return on(side, lambda: x.cumsum(0))

    check_replays(fn, "cuda")


@gpu
def test_replay_on_any_stream():
    x = torch.ones(SHAPE, device="cuda")
    graph, out = capture(lambda: mixed(x * 2) + 1, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for value in (2, 3, 4):
            x.fill_(value)
            graph.replay()
            torch.testing.assert_close(out, mixed(x * 2) + 1)
    side.synchronize()


@gpu
def test_a_given_stream_is_the_capture_stream():
    stream, seen = torch.cuda.Stream(), []
    x = torch.ones(SHAPE, device="cuda")

    def fn():
        seen.append(torch.cuda.current_stream())
        return mixed(x * 2)

    capture(fn, "cuda", stream=stream)
    capture(fn, "cuda"), capture(fn, "cuda")
    assert seen[0] == stream and seen[1] == seen[2] != stream


@gpu
def test_what_was_queued_before_the_capture_is_seen_by_it():
    x = torch.zeros(SHAPE, device="cuda")
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        big = (big @ big).tanh()
    x.add_(big.sum() * 0 + 3)
    _, out = capture(lambda: mixed(x * 2), "cuda")
    torch.testing.assert_close(out, mixed(x * 2))


@gpu
def test_dropout_draws_afresh_at_each_replay_and_follows_the_seed():
    x = torch.ones(1 << 12, device="cuda")
    graph, out = capture(lambda: mixed(F.dropout(x, 0.5)) + F.dropout(x, 0.5), "cuda")
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        for _ in range(2):
            graph.replay()
            draws.append(out.clone())
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])


@gpu
def test_the_default_stream_waits_for_the_capture():
    x = torch.ones(1 << 24, device="cuda")
    graph = BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph):
        y = x
        for _ in range(50):
            y = y + 1
    assert y.sum().item() == 51 << 24
