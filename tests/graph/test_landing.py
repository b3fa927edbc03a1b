"""What a break returns is written back to where its first result landed."""

import dataclasses
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from breakgraph.graph import LayoutChangedError, eager_on_graph

from .support import SHAPE, capture, check_replays, gc_disabled, poison, pool_bytes, watch

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    count: int = 0
    residual: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenOutput:
    hidden: torch.Tensor
    count: int = 0


@dataclasses.dataclass(slots=True, frozen=True)
class SlottedOutput:
    hidden: torch.Tensor
    count: int = 0


class PlainOutput:
    def __init__(self, hidden, count):
        self.hidden, self.count, self.notes = hidden, count, ["note"]


def halves(x):
    return x.cumsum(0) * (1 + int((x > 0).sum())), x.flip(0)


def tensors(value):
    """The tensors in any of the results below, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif hasattr(value, "__dict__"):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


RESULTS = {
    "tensor": lambda x: halves(x)[0],
    "tuple": halves,
    "namedtuple": lambda x: Pair(*halves(x)),
    "list": lambda x: list(halves(x)),
    "dict": lambda x: dict(zip("ab", halves(x), strict=True)),
    "ordered dict": lambda x: OrderedDict(zip("ab", halves(x), strict=True)),
    "dataclass": lambda x: Output(*halves(x)[:1], residual=halves(x)[1]),
    "frozen dataclass": lambda x: FrozenOutput(halves(x)[0]),
    "slotted dataclass": lambda x: SlottedOutput(halves(x)[0]),
    "plain object": lambda x: PlainOutput(halves(x)[0], 1),
    "namespace": lambda x: SimpleNamespace(a=halves(x)[0], b="b"),
    "model output": lambda x: BaseModelOutputWithPast(halves(x)[0], hidden_states=halves(x)),
    "nested": lambda x: {"a": [halves(x), Output(x.sin())], "b": (Pair(x.cos(), 1), None)},
    "same object twice": lambda x: (lambda out: [out, out])(Output(halves(x)[0])),
    "integers": lambda x: (x * 10).long(),
    "transposed": lambda x: x.cumsum(0).t(),
    "expanded": lambda x: x[:1].clone().expand(3, -1),
    "no dimensions": lambda x: x.sum(),
    "no elements": lambda x: x[:0].clone(),
    "complex": lambda x: torch.complex(x, x).conj(),
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_of_result_lands(name, device):
    make = eager_on_graph()(RESULTS[name])

    kind = type(make(torch.ones(SHAPE, device=device)))

    def fn(x):
        result = make(x * 2)
        assert type(result) is kind and tensors(result)
        return [tensor * 2 for tensor in tensors(result)]

    check_replays(fn, device)


def test_one_object_in_two_places_stays_one(device):
    make = eager_on_graph()(RESULTS["same object twice"])
    x = torch.ones(SHAPE, device=device)
    _, (first, second) = capture(lambda: make(x), device)
    assert first is second


def test_fields_that_are_no_tensors_are_replaced(device):
    live = {"count": 1}

    @eager_on_graph()
    def make(x):
        count = live["count"]
        flat = [x.cumsum(0), count]
        return Output(x.cumsum(0), count, residual={"count": count, "names": ("a", None)}), flat

    x = torch.ones(SHAPE, device=device)
    graph, (out, flat) = capture(lambda: make(x * 2), device)
    live["count"] = 7
    graph.replay()
    assert out.count == out.residual["count"] == flat[1] == 7
    assert out.residual["names"] == ("a", None)


def test_a_frozen_dataclass_has_its_fields_replaced(device):
    live = {"count": 1}
    make = eager_on_graph()(lambda x: FrozenOutput(x.cumsum(0), live["count"]))
    x = torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: make(x), device)
    live["count"] = 2
    graph.replay()
    assert out.count == 2


CHANGES = {
    "shape": (lambda x: x[1:].clone(), r"tensor of shape \[4, 8\].*tensor of shape \[3, 8\]"),
    "dtype": (lambda x: x.double(), "float32.*float64"),
    "None": (lambda x: None, "is None at replay"),
    "tuple": (lambda x: (x,), "tuple of 1"),
    "number": (lambda x: 3, "is 3 at replay"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, 1),
        lambda t: [1, t],
        lambda t: {"t": t},
        lambda t: Output(t),
        lambda t: SimpleNamespace(t=t, is_tensor=torch.ones(1)),
    ],
    ids=["bare", "tuple", "list", "dict", "dataclass", "object"],
)
def test_a_tensor_that_becomes_something_else_is_an_error(change, wrap, device):
    changed, message = CHANGES[change]
    live = {"changed": False}

    @eager_on_graph()
    def make(x):
        return wrap(changed(x) if live["changed"] else x.cumsum(0))

    x = torch.ones(SHAPE, device=device)
    graph, _ = capture(lambda: make(x * 2), device)
    graph.replay()
    live["changed"] = True
    with pytest.raises(LayoutChangedError, match=rf"break .*make: its result.*{message}"):
        graph.replay()
    live["changed"] = False
    graph.replay()


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ([1, 2], [1]),
        ((1, 2), (1, 2, 3)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1], (1,)),
        ({"a": 1}, OrderedDict(a=1)),
        (Pair(1, 2), (1, 2)),
        (Output(None), FrozenOutput(None)),
        ([None], [torch.ones(1)]),
        ((None,), (torch.ones(1),)),
        (Output(None), Output(torch.ones(1))),
    ],
    ids=repr,
)
def test_a_structure_that_changes_is_an_error(first, later):
    live = [first]
    make = eager_on_graph()(lambda: live[0])
    graph, _ = capture(make, "cpu")
    graph.replay()
    live[0] = later
    with pytest.raises(LayoutChangedError, match="same structure"):
        graph.replay()


@pytest.mark.parametrize(("first", "later"), [(3, 4), ("a", "b"), (True, 1), ((1, 2), (1, 3))])
def test_a_constant_that_code_has_seen_may_not_change(first, later, device):
    live = [first]
    make = eager_on_graph()(lambda: live[0])
    graph, _ = capture(make, device)
    graph.replay()
    live[0] = later
    with pytest.raises(LayoutChangedError, match="at replay"):
        graph.replay()


def test_a_result_that_is_an_argument_is_not_copied(device):
    @eager_on_graph()
    def in_place(x, rows):
        x.mul_(1 + int((x > 0).sum()))
        return x, x[1:], rows

    def fn(x):
        y = x * 2
        same, tail, rows = in_place(y, (x + 1,))
        assert same is y and tail.data_ptr() == y[1:].data_ptr()
        tail.add_(1)
        return y + rows[0]

    check_replays(fn, device)


def test_a_result_that_stops_being_its_argument_is_an_error(device):
    live = {"copy": False}

    @eager_on_graph()
    def maybe(x, other):
        return other.clone() if live["copy"] else x

    x = torch.ones(SHAPE, device=device)
    graph, _ = capture(lambda: maybe(x * 2, x), device)
    graph.replay()
    live["copy"] = True
    with pytest.raises(LayoutChangedError, match="view of"):
        graph.replay()


def test_a_result_that_becomes_its_argument_is_copied(device):
    live = {"copy": True}

    @eager_on_graph()
    def maybe(x):
        return x.clone() if live["copy"] else x

    x = torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: maybe(x * 2) + 1, device)
    live["copy"] = False
    x.fill_(3)
    graph.replay()
    assert out.eq(7).all()


def test_a_result_kept_by_the_break_is_copied(device):
    kept = torch.zeros(SHAPE, device=device)

    @eager_on_graph()
    def into_kept(x):
        return kept.copy_(x)

    x = torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: into_kept(x * 2), device)
    kept.zero_()
    assert out.eq(2).all()
    x.fill_(3)
    graph.replay()
    assert out.eq(6).all() and out.data_ptr() != kept.data_ptr()


def test_landed_memory_is_the_pools_again_once_dropped(device):
    """A chain of returning breaks needs no more memory than two links of it."""
    shape = (3, 1 << 20)

    def chain(links, make):
        step = eager_on_graph()(make)
        x = torch.ones(shape, device=device)

        def fn():
            y = x * 1
            for _ in range(links):
                y = tensors(step(y))[0] * 0.5
            return y

        return capture(fn, device)[0]

    for make in (torch.sin, lambda y: Output(torch.sin(y)), lambda y: (torch.sin(y), None)):
        assert pool_bytes(chain(8, make)) == pool_bytes(chain(2, make))


def test_a_dropped_result_is_not_held(device):
    make = eager_on_graph()(lambda x: Output(x.cumsum(0), 3))
    alive = []
    x = torch.ones(SHAPE, device=device)

    def fn():
        out = make(x * 2)
        alive.append(watch(out.hidden))
        return out.hidden + 1

    with gc_disabled():
        graph, out = capture(fn, device)
        assert not alive[0]()
    x.fill_(2)
    poison(graph)
    graph.replay()
    assert out[-1].eq(4 * SHAPE[0] + 1).all()


@pytest.mark.gpu
def test_a_result_on_the_host_stays_on_the_host():
    make = eager_on_graph()(lambda x: (x.sum().cpu(), x * 2))
    x = torch.ones(SHAPE, device="cuda")
    graph, (host, _) = capture(lambda: make(x * 2), "cuda")
    assert host.device.type == "cpu" and host.item() == 64
    x.fill_(2)
    graph.replay()
    assert host.item() == 128
