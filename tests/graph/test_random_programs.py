"""Any small program of ops, views, in-place ops, breaks and drops replays as it runs eagerly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.graph import break_graph, eager_on_graph

from .support import capture, poison

SIZE = 4


@eager_on_graph()
def fresh(x):
    return x.sin() * (1 + int((x > 0).sum()) % 3)


@eager_on_graph()
def into(x, out):
    out.copy_(x.cos() * (1 + int((x > 0).sum()) % 3))


@eager_on_graph()
def in_place(x):
    return x.mul_(0.5 + int((x > 0).sum()) % 2)


@eager_on_graph()
def pair(x, *, other):
    return {"sum": x + other, "parts": (x - other, [x.t().contiguous()])}


def run_into(x):
    out = torch.empty_like(x)
    into(x, out)
    return out


def run_pair(a, b):
    out = pair(a, other=b)
    return out["sum"] * 0.5 + out["parts"][0] + out["parts"][1][0]


def shifted(a, b):
    a[1:].add_(b[:-1].clone(), alpha=0.5)
    return a


BINARY = {
    "add": lambda a, b: (a + b) * 0.5,
    "matmul": lambda a, b: (a @ b).tanh(),
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "cat": lambda a, b: torch.cat([a[:2], b[2:]]),
    "add_": lambda a, b: a.add_(b.clone(), alpha=0.25),
    "shifted_": shifted,
    "pair": run_pair,
}
UNARY = {
    "sin": torch.sin,
    "copy": torch.clone,
    "transposed": lambda a: a.t(),
    "flipped": lambda a: a.flip(0),
    "rotated view": lambda a: a.t_().t_(),
    "sorted": lambda a: a.sort(0).values,
    "chunk": lambda a: torch.cat(a.chunk(2, 1)[::-1], 1),
    "constant": lambda a: a * torch.tensor(0.5) + torch.ones_like(a),
    "zero row_": lambda a: a.index_fill_(0, torch.arange(1, device=a.device), 0.25),
    "fresh": fresh,
    "into": run_into,
    "in_place": in_place,
    "split": lambda a: (break_graph(), a)[1],
}
POSITIONS = st.integers(0, 7)
STEPS = st.one_of(
    st.tuples(st.sampled_from(sorted(BINARY)), POSITIONS, POSITIONS),
    st.tuples(st.sampled_from(sorted(UNARY)), POSITIONS),
    st.tuples(st.just("drop"), POSITIONS),
)


def interpret(program, x):
    values = [x * 1, x]
    for name, *positions in program:
        picked = [position % len(values) for position in positions]
        if name == "drop":
            if len(values) > 1:
                values.pop(picked[0])
            continue
        made = (BINARY | UNARY)[name](*[values[at] for at in picked])
        values.append(made)
        if len(values) > 8:
            values.pop(0)
    return torch.stack(values)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@settings(max_examples=80)
@given(program=st.lists(STEPS, max_size=16), seed=st.integers(0, 99))
@torch.no_grad()
def test_replay_equals_eager(device, program, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64).to(device)

    x, first = draw(), draw()
    x.copy_(first)
    graph, out = capture(lambda: interpret(program, x), device)
    torch.testing.assert_close(out, interpret(program, first))
    for _ in range(2):
        new = draw()
        x.copy_(new)
        poison(graph)
        graph.replay()
        torch.testing.assert_close(out, interpret(program, new))
