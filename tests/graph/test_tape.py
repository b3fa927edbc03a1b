"""The CPU tape has a CUDA graph's semantics, and refuses what a stream capture would."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from breakgraph.graph import RefusedOpError, TapePool, eager_on_graph

from .support import SHAPE, capture, check_replays, mixed, poison

HOST_SYNCS = {
    "item": lambda y: y.sum().item(),
    "float": lambda y: float(y.sum()),
    "bool": lambda y: bool(y.any()),
    "tolist": lambda y: y.tolist(),
    "cpu": lambda y: y.cpu(),
    "numpy": lambda y: y.numpy(),
    "np.asarray": lambda y: np.asarray(y),
    "equal": lambda y: torch.equal(y, y),
    "nonzero": lambda y: y.nonzero(),
    "unique": lambda y: y.unique(),
    "masked_select": lambda y: y.masked_select(y > 0),
    "mask": lambda y: y[y > 0],
    "row mask": lambda y: y[torch.ones(4, dtype=torch.bool, device=y.device)],
    "where": lambda y: torch.where(y > 0),
    "assignment by mask": lambda y: y.__setitem__(y > 0, y.reshape(-1)),
    "repeat_interleave": lambda y: y.repeat_interleave(torch.arange(4, device=y.device), dim=0),
    "iteration": lambda y: [float(row) for row in y[0]],
    "print": lambda y: str(y),
}


@pytest.mark.parametrize("name", HOST_SYNCS)
def test_a_host_sync_is_refused_with_its_call_site(name, device):
    x = torch.ones(SHAPE, device=device)
    with pytest.raises(RefusedOpError, match=r"test_tape\.py:\d+ in .*eager_on_graph"):
        capture(lambda: HOST_SYNCS[name](mixed(x * 2) * 2), device)


@pytest.mark.parametrize("name", ["item", "tolist", "cpu", "mask", "nonzero", "print"])
def test_a_break_may_wait_for_the_device(name, device):
    wait = eager_on_graph()(lambda y: HOST_SYNCS[name](y) is None)
    x = torch.ones(SHAPE, device=device)
    graph, _ = capture(lambda: wait(x * 2), device)
    graph.replay()


def test_a_host_read_is_refused_in_the_capturing_thread_alone():
    y, seen = torch.ones(2), []

    def fn():
        thread = threading.Thread(target=lambda: seen.append((y.tolist(), str(y))))
        thread.start()
        thread.join(10)
        y.tolist()

    with pytest.raises(RefusedOpError, match="tolist"):
        capture(fn, "cpu")
    assert seen == [([1, 1], "tensor([1., 1.])")] and y.tolist() == [1, 1]


def test_an_op_on_the_tape_may_read_its_arguments():
    @torch.library.custom_op("breakgraph_tests::reads", mutates_args=())
    def reads(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(x.tolist()) + torch.from_numpy(x.numpy())

    check_replays(lambda x: reads(x * 2) + 1, "cpu")


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randn(3),
        lambda x: torch.rand_like(x),
        lambda x: F.dropout(x, 0.5),
        lambda x: x.bernoulli(),
        lambda x: x.clone().normal_(),
        lambda x: torch.randperm(4),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
)
def test_random_ops_are_refused_on_the_tape(draw):
    x = torch.ones(SHAPE)
    with pytest.raises(RefusedOpError, match=r"random.*test_tape\.py"):
        capture(lambda: draw(x), "cpu")


def test_what_only_could_draw_is_not_refused():
    check_replays(lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0), "cpu")
    check_replays(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0), "cpu")
    check_replays(
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        "cpu",
    )


@pytest.mark.parametrize(
    "move", [lambda y: y.resize_(2, 2), lambda y: y.set_(), lambda y: y.resize_as_(y[0])]
)
def test_moving_a_tensor_is_refused(move, device):
    x = torch.ones(SHAPE, device=device)
    with pytest.raises(RefusedOpError, match=r"other memory.*test_tape\.py"):
        capture(lambda: move(x * 2), device)


def test_unwritten_memory_stays_unwritten(device):
    """``empty`` is no op of a graph: what a segment did not write, a replay does not clear."""
    x = torch.ones(SHAPE, device=device)

    def fn():
        memory = x.new_empty(SHAPE)
        memory[0].copy_(x[0])
        return memory

    graph, out = capture(fn, device)
    assert all("empty" not in name for name in graph.steps[0].segment.node_names())
    poison(graph)
    graph.replay()
    assert out[0].eq(1).all() and out[1:].isnan().all()


def test_the_poison_is_nan_and_minus_one():
    pool = TapePool()
    x = torch.ones(SHAPE)
    _, (y, half, rows) = capture(
        lambda: (x * 2, x.to(torch.bfloat16), torch.arange(4)), "cpu", pool=pool
    )
    pool.poison()
    assert y.isnan().all() and half.isnan().all() and rows.eq(-1).all()


def test_a_pool_gives_a_block_to_the_next_one_that_fits():
    pool = TapePool()
    first, _ = pool.allocate(4000)
    second, _ = pool.allocate(1000)
    total = pool.num_bytes
    places = first.data_ptr(), second.data_ptr()
    del second
    third, _ = pool.allocate(900)
    assert third.data_ptr() == places[1]
    del first, third
    small, _ = pool.allocate(1)
    large, _ = pool.allocate(3000)
    assert (small.data_ptr(), large.data_ptr()) == places[::-1]
    assert pool.num_bytes == total == 4096 + 1024


def test_a_block_stays_valid_for_its_second_storage():
    pool = TapePool()
    owner, block = pool.allocate(512)
    place = owner.data_ptr()
    del owner
    assert block.data_ptr() == place
    again, _ = pool.allocate(512)
    assert again.data_ptr() == place


def test_blocks_come_back_after_the_pool_is_gone():
    pool = TapePool()
    owner, block = pool.allocate(512)
    del pool
    torch.tensor([], dtype=torch.uint8).set_(block).fill_(1)
    del owner, block


def test_segments_name_their_ops():
    x = torch.ones(SHAPE)
    graph, _ = capture(lambda: mixed((x * 2).t() + 1).relu(), "cpu")
    names = [step.segment.node_names() for step in graph.steps if step.segment]
    assert names == [["aten.mul.Tensor", "aten.add.Tensor"], ["aten.relu.default"]]
    segment = graph.steps[0].segment
    graph.reset()
    assert segment.node_names() == []


def test_an_op_that_returns_its_own_memory_is_run_again():
    """A custom op: opaque to the tape, its result copied to where the first one landed."""
    kept = torch.zeros(SHAPE)

    @torch.library.custom_op("breakgraph_tests::kept", mutates_args=())
    def keep(x: torch.Tensor) -> torch.Tensor:
        return kept.copy_(x * 2).clone()

    check_replays(lambda x: keep(x + 1) + mixed(x), "cpu")


def test_custom_ops_that_write_their_arguments_replay(device):
    @torch.library.custom_op(f"breakgraph_tests::double_into_{device}", mutates_args={"out"})
    def double_into(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 2)

    def fn(x):
        out = torch.empty_like(x)
        double_into(x + 1, out)
        return mixed(out) + out

    check_replays(fn, device)
