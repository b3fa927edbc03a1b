"""A break takes tensors and constants; what could change behind its back is refused."""

import dataclasses
import enum
import functools
from collections import namedtuple

import numpy as np
import pytest
import torch

from breakgraph.graph import RefusedArgumentError, eager_on_graph

from .support import SHAPE, capture, check_replays


@eager_on_graph()
def attend(x, *args, **kwargs):
    return x.cumsum(0)


@dataclasses.dataclass
class Batch:
    lengths: list[int]


class Color(enum.Enum):
    RED = 1


Sizes = namedtuple("Sizes", ["rows", "x"])


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ([1, 2], "list"),
        ({"lengths": 3}, "dict"),
        ({1, 2}, "set"),
        (Batch([1, 2]), "Batch"),
        (np.ones(3), "ndarray"),
        (bytearray(b"1"), "bytearray"),
        ((1, ([2],)), "list"),
        (iter(()), "tuple_iterator"),
    ],
)
def test_mutable_arguments_are_refused(argument, kind, device):
    x = torch.ones(SHAPE, device=device)
    with pytest.raises(RefusedArgumentError, match=rf"attend: argument 1.* is a {kind}") as first:
        capture(lambda: attend(x, argument), device)
    with pytest.raises(TypeError, match=rf"argument 'live'.* is a {kind}"):
        capture(lambda: attend(x, live=argument), device)
    assert "test_arguments.py" in str(first.value)
    assert "get_forward_context" in str(first.value)


def test_a_nested_argument_is_named_by_its_place():
    with pytest.raises(RefusedArgumentError, match=r"argument 1\[1\]\[0\] is a list"):
        capture(lambda: attend(torch.ones(2), (1, ([2],))), "cpu")


@pytest.mark.parametrize(
    "view", [lambda x: torch.complex(x, x).conj(), lambda x: torch.complex(x, x).conj().imag]
)
def test_lazy_views_are_refused(view, device):
    x = torch.ones(SHAPE, device=device)
    with pytest.raises(RefusedArgumentError, match="resolve_conj"):
        capture(lambda: attend(view(x)), device)


CONSTANTS = (
    None,
    True,
    3,
    2.5,
    1j,
    "name",
    b"bytes",
    Color.RED,
    range(3),
    slice(1, 2),
    ...,
    int,
    torch.float16,
    torch.device("cpu"),
    torch.strided,
    torch.channels_last,
    torch.nn.Identity(),
    lambda: None,
    len,
    torch.Size([1, 2]),
    (1, ("a", None)),
    Sizes(1, "x"),
)


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda constant: type(constant).__name__)
def test_constants_reach_each_replay_as_they_are(constant):
    seen = []

    @eager_on_graph()
    def note(value, *, again):
        seen.append((value, again))

    graph, _ = capture(lambda: note(constant, again=constant), "cpu")
    graph.replay()
    assert [type(value) for value in seen[1]] == [type(constant)] * 2
    assert seen[0] == seen[1] == (constant, constant)


def test_tensors_in_tuples_are_fixed_by_address(device):
    @eager_on_graph()
    def combine(pair, *, sizes):
        assert isinstance(sizes, Sizes)
        return (pair[0] - pair[1][0]) * sizes.rows + sizes.x

    def fn(x):
        return combine((x * 2, (x + 1, "x")), sizes=Sizes(3, x * 5)) * 2

    check_replays(fn, device)


def test_rebinding_what_was_passed_changes_nothing(device):
    x = torch.ones(SHAPE, device=device)
    weight = torch.full(SHAPE, 2.0, device=device)
    product = eager_on_graph()(torch.mul)
    graph, out = capture(lambda: product(x, weight), device)
    weight.unsqueeze_(0).transpose_(1, 2)
    graph.replay()
    assert out.eq(2).all()


def test_a_partial_fixes_more_than_arguments_can(device):
    """The documented way round: what a break closes over is its own business."""
    lengths = [1]
    live = eager_on_graph()(functools.partial(lambda lengths, x: x * len(lengths), lengths))
    x = torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: live(x * 2), device)
    lengths.append(2)
    graph.replay()
    assert out.eq(4).all()
