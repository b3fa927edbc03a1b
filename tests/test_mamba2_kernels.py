"""The Mamba-2 ops equal the recurrence token by token, whatever the packing."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import CHUNK, Plan

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture
from breakgraph.kernels.mamba2 import (
    mamba2_scan,
    mamba2_scan_reference,
    mamba2_step,
    mamba2_step_reference,
)
from breakgraph.kernels.mamba2_cuda import _kernels, _scan_specials


@dataclass
class Shape:
    heads: int = 4
    groups: int = 2
    head_dim: int = 3
    state_dim: int = 5


@dataclass
class Layer:
    """The parameters of a mixer and its state pool."""

    a_log: torch.Tensor
    d: torch.Tensor
    dt_bias: torch.Tensor
    state: torch.Tensor
    dt_min: float = 0.001
    dt_max: float = 1.5

    @classmethod
    def random(cls, shape: Shape, *, slots: int = 7, device: str = "cpu") -> Layer:
        draw = torch.Generator().manual_seed(shape.heads)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw).to(device)

        layers = normal(slots, 2, shape.heads, shape.head_dim, shape.state_dim)
        a_log = torch.rand(shape.heads, generator=draw).mul(16).add(0.01).log().to(device)
        return cls(a_log, normal(shape.heads), normal(shape.heads) - 2, layers[:, 1])

    def copy(self) -> Layer:
        return replace(self, state=self.state.clone())


@dataclass
class Tokens:
    """What is projected for each row, as views of the rows of two wide tensors."""

    x: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    dt: torch.Tensor

    @classmethod
    def random(
        cls,
        rows: int,
        shape: Shape,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> Tokens:
        draw = torch.Generator().manual_seed(seed)
        widths = [shape.heads * shape.head_dim, *[shape.groups * shape.state_dim] * 2]
        mixed = torch.randn(rows, sum(widths), generator=draw).to(device, dtype)
        wide = torch.randn(rows, 2 * shape.heads + 8, generator=draw).to(device, dtype)
        x, b, c = mixed.split(widths, 1)
        return cls(
            x.unflatten(1, (shape.heads, shape.head_dim)),
            b.unflatten(1, (shape.groups, shape.state_dim)),
            c.unflatten(1, (shape.groups, shape.state_dim)),
            wide[:, 8 : 8 + shape.heads],
        )

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.x[rows], self.b[rows], self.c[rows], self.dt[rows])


def by_token(
    tokens: Tokens, layer: Layer, plan: Plan, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``out`` and ``state`` should be: the recurrence in float64."""
    out, states = out.clone(), layer.state.clone()
    x, b, c, dt = (getattr(tokens, name).double() for name in ("x", "b", "c", "dt"))
    b, c = (t.repeat_interleave(x.shape[1] // b.shape[1], 1) for t in (b, c))
    dt = F.softplus(dt + layer.dt_bias.double()).clamp(layer.dt_min, layer.dt_max)
    decay = torch.exp(-layer.a_log.double().exp() * dt)
    bounds = plan.cu_seqlens.tolist()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        initial = int(plan.initial_slots[i])
        state = torch.zeros_like(layer.state[0], dtype=torch.float64)
        if initial >= 0:
            state = layer.state[initial].double()
        for t in range(begin, end):
            state = decay[t, :, None, None] * state
            state += (dt[t, :, None] * x[t])[..., None] * b[t, :, None]
            out[t] = torch.einsum("hpn,hn->hp", state, c[t]) + layer.d.double()[:, None] * x[t]
        states[plan.final_slots[i]] = state.float()
    return out, states


def run(
    tokens: Tokens,
    layer: Layer,
    plan: Plan,
    chunk_size: int = CHUNK,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is None:
        out = torch.full(tokens.x.shape, 7.0, dtype=tokens.x.dtype, device=tokens.x.device)
    mamba2_scan(
        *(tokens.x, tokens.b, tokens.c, tokens.dt, layer.a_log, layer.d, layer.dt_bias),
        *(layer.dt_min, layer.dt_max, layer.state, plan.cu_seqlens, plan.initial_slots),
        *(plan.final_slots, plan.chunks, plan.chunk_offsets, chunk_size, out),
    )
    return out


def step(tokens: Tokens, layer: Layer, slots: torch.Tensor, out: torch.Tensor) -> None:
    mamba2_step(
        *(tokens.x, tokens.b, tokens.c, tokens.dt, layer.a_log, layer.d, layer.dt_bias),
        *(layer.dt_min, layer.dt_max, layer.state, slots, out),
    )


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    continued=st.lists(st.booleans(), min_size=4, max_size=4),
    moved=st.booleans(),
    groups=st.integers(1, 2),
    heads_per_group=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    state_dim=st.integers(1, 6),
)
@settings(max_examples=40)
def test_any_batch(
    lengths: list[int],
    continued: list[bool],
    moved: bool,
    groups: int,
    heads_per_group: int,
    head_dim: int,
    state_dim: int,
) -> None:
    shape = Shape(groups * heads_per_group, groups, head_dim, state_dim)
    final = list(range(1, len(lengths) + 1))
    initial = [slot if old else -1 for slot, old in zip(final, continued, strict=False)]
    if moved:
        final = [slot % 6 + 1 for slot in final]
        initial = [0 if slot >= 0 else -1 for slot in initial]
    layer, tokens = Layer.random(shape), Tokens.random(sum(lengths) + 2, shape)
    plan = Plan.of(lengths, initial, final)
    expected, states = by_token(tokens, layer, plan, torch.full_like(tokens.x, 7.0))
    out = run(tokens, layer, plan)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state, states, rtol=1e-4, atol=1e-5)
    untouched = [s for s in range(7) if s not in final or not lengths[final.index(s)]]
    assert torch.equal(layer.state[untouched], states[untouched])


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_a_sequence_in_pieces_is_the_sequence(piece: int) -> None:
    shape = Shape()
    layer, tokens = Layer.random(shape), Tokens.random(100, shape)
    pieces, whole = layer.copy(), run(tokens, layer, Plan.of([100], [-1], [3]))
    for begin in range(0, 100, piece):
        part = tokens[begin : begin + piece]
        out = run(part, pieces, Plan.of([len(part.x)], [3 if begin else -1], [3]))
        torch.testing.assert_close(out, whole[begin : begin + piece], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pieces.state[3], layer.state[3], rtol=1e-4, atol=1e-5)


def test_neighbours_do_not_matter() -> None:
    shape, lengths = Shape(), [3, 30, 1, 17]
    layer, tokens = Layer.random(shape), Tokens.random(51, shape)
    alone = layer.copy()
    outs = run(tokens, layer, Plan.of(lengths, [1, -1, 3, 4], [1, 2, 3, 4])).split(lengths)
    begin = 0
    for i, length in enumerate(lengths):
        slot = i + 1
        plan = Plan.of([length], [-1 if i == 1 else slot], [slot])
        out = run(tokens[begin : begin + length], alone, plan)
        torch.testing.assert_close(out, outs[i], rtol=1e-5, atol=1e-5)
        begin += length
    torch.testing.assert_close(alone.state, layer.state, rtol=1e-5, atol=1e-5)


def test_a_step_is_a_scan_of_one_token() -> None:
    shape = Shape()
    layer, tokens = Layer.random(shape), Tokens.random(4, shape)
    other, slots = layer.copy(), [5, 1, 6, 2]
    expected = run(tokens, layer, Plan.of([1] * 4, slots, slots))
    out = torch.empty_like(expected)
    step(tokens, other, torch.tensor(slots), out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.state, layer.state, rtol=1e-5, atol=1e-5)


def test_padded_steps_may_share_a_slot() -> None:
    shape = Shape()
    layer, tokens = Layer.random(shape), Tokens.random(4, shape)
    before, out = layer.copy(), torch.empty_like(tokens.x)
    step(tokens, layer, torch.tensor([2, 0, 0, 0]), out)
    assert out.isfinite().all() and layer.state[0].isfinite().all()
    untouched = [1, 3, 4, 5, 6]
    assert torch.equal(before.state[untouched], layer.state[untouched])


def test_a_captured_call_reads_the_plan_at_replay() -> None:
    shape = Shape()
    layer, tokens = Layer.random(shape), Tokens.random(40, shape)
    fixed = Plan.of([5, 30], [-1, 2], [1, 2], spare=3, padding_chunks=4)
    second = Plan.of([20, 1, 15], [4, 1, -1], [4, 1, 2], spare=2, padding_chunks=3)
    graph, out = BreakableCUDAGraph(), torch.empty(40, 4, 3)
    with BreakableCUDAGraphCapture(graph, device="cpu"):
        run(tokens, layer, fixed, out=out)
    fixed.copy_(second)
    out.fill_(7.0)
    expected, states = by_token(tokens, layer, second, out)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state, states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 40])
def test_the_layer_of_transformers_agrees(length: int) -> None:
    nemotron = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    shape = Shape()
    layer, tokens = Layer.random(shape), Tokens.random(length, shape)
    expected, final = nemotron.mamba2_chunk_scan(
        *(tokens.x[None], tokens.dt[None], -layer.a_log.exp(), tokens.b[None], tokens.c[None]),
        chunk_size=8,
        D=layer.d,
        dt_bias=layer.dt_bias,
        dt_softplus=True,
        dt_limit=(layer.dt_min, layer.dt_max),
        initial_states=layer.state[3:4].clone(),
        return_final_states=True,
    )
    out = run(tokens, layer, Plan.of([length], [3], [3]))
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state[3], final[0], rtol=1e-4, atol=1e-5)


def test_without_triton_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        _kernels()


def test_what_the_kernels_would_misread_is_refused() -> None:
    dense, dt = (24, 3, 1), (4, 1)
    layout = (dense, dense, dense, dt, (60, 15, 5, 1), dense)
    with pytest.raises(ValueError, match="chunks of 16, 32, 64"):
        _scan_specials((4, 3), (2, 5), True, 0.0, 1.0, 48, *layout)
    with pytest.raises(ValueError, match="dense last dimension"):
        _scan_specials((4, 3), (2, 5), True, 0.0, 1.0, 64, (24, 6, 2), *layout[1:])


SHAPES = [
    Shape(8, 2, 64, 128),
    Shape(6, 3, 80, 16),
    Shape(3, 1, 5, 7),
    Shape(16, 1, 32, 96),
]


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within 1e-4 of the largest value, or for bfloat16 within 1% of the norm and 2% of it."""
    error, expected = (got - expected).float(), expected.float()
    of_norm, of_largest = (1e-4, 1e-4) if dtype == torch.float32 else (1e-2, 2e-2)
    assert error.norm() <= of_norm * expected.norm()
    assert error.abs().max() <= of_largest * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_size", [16, 64, 128])
def test_kernels_equal_the_reference(dtype: torch.dtype, shape: Shape, chunk_size: int) -> None:
    for lengths in ([1], [2, 0, 130, 64, 3], [300, 1]):
        slots = list(range(1, len(lengths) + 1))
        initial = [-1 if slot == 3 else slot for slot in slots]
        plan = Plan.of(lengths, initial, slots, chunk_size=chunk_size, device="cuda")
        layer = Layer.random(shape, device="cuda")
        expected = layer.copy()
        tokens = Tokens.random(sum(lengths) + 2, shape, dtype=dtype, device="cuda")
        out = run(tokens, layer, plan, chunk_size)
        wanted = torch.full_like(out, 7.0)
        mamba2_scan_reference(
            *(tokens.x, tokens.b, tokens.c, tokens.dt, layer.a_log, layer.d, layer.dt_bias),
            *(layer.dt_min, layer.dt_max, expected.state, plan.cu_seqlens, plan.initial_slots),
            *(plan.final_slots, plan.chunks, plan.chunk_offsets, chunk_size, wanted),
        )
        assert_close(out, wanted, dtype)
        assert torch.equal(out[sum(lengths) :], wanted[sum(lengths) :])
        assert_close(layer.state, expected.state, dtype)
        idle = [0, *(slot for slot, length in zip(slots, lengths, strict=True) if not length)]
        assert torch.equal(layer.state[idle], expected.state[idle])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_kernel_equals_the_reference(dtype: torch.dtype, shape: Shape) -> None:
    layer = Layer.random(shape, device="cuda")
    expected = layer.copy()
    tokens = Tokens.random(6, shape, dtype=dtype, device="cuda")
    slots = torch.tensor([5, 2, 1, 0, 0, 0], device="cuda")
    out, wanted = torch.full_like(tokens.x, 7.0), torch.full_like(tokens.x, 7.0)
    step(tokens, layer, slots, out)
    mamba2_step_reference(
        *(tokens.x, tokens.b, tokens.c, tokens.dt, layer.a_log, layer.d, layer.dt_bias),
        *(layer.dt_min, layer.dt_max, expected.state, slots, wanted),
    )
    assert_close(out[:3], wanted[:3], dtype)
    assert out.isfinite().all() and layer.state.isfinite().all()
    torch.testing.assert_close(layer.state[1:], expected.state[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("limits", [(0.0, float("inf")), (0.001, 0.1)])
def test_large_and_small_steps(limits: tuple[float, float]) -> None:
    shape = Shape(4, 2, 64, 128)
    layer = replace(Layer.random(shape, device="cuda"), dt_min=limits[0], dt_max=limits[1])
    tokens = Tokens.random(100, shape, device="cuda")
    tokens.dt.mul_(20)
    plan = Plan.of([100], [1], [1], chunk_size=64, device="cuda")
    expected, states = by_token(tokens, layer, plan, torch.empty_like(tokens.x))
    out = run(tokens, layer, plan, 64)
    # The decay between two tokens is a difference of sums over the chunk, here up to 60000.
    largest = expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3 * largest)
    torch.testing.assert_close(layer.state, states, rtol=1e-4, atol=1e-3 * largest)


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_plan_at_replay() -> None:
    shape = Shape(4, 2, 64, 32)
    layer = Layer.random(shape, device="cuda")
    tokens = Tokens.random(200, shape, device="cuda")
    where: dict[str, Any] = {"chunk_size": 64, "device": "cuda"}
    fixed = Plan.of([5], [-1], [1], spare=4, padding_chunks=5, **where)
    out = run(tokens, layer, fixed, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(tokens, layer, fixed, 64, out)
    for plan in (
        Plan.of([66, 64, 2, 1], [1, -1, 3, 4], [1, 2, 3, 5], spare=1, padding_chunks=1, **where),
        Plan.of([200], [2], [2], spare=4, padding_chunks=2, **where),
    ):
        fixed.copy_(plan)
        out.fill_(7.0)
        expected, states = by_token(tokens, layer, plan, out)
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.state, states, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    shape = Shape()
    layer, tokens = (
        Layer.random(shape, device="cuda"),
        Tokens.random(70, shape, device="cuda"),
    )
    plan, slots = Plan.of([70], [1], [1], device="cuda"), torch.arange(7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(tokens, layer, plan)
        step(tokens[:7], layer, slots, torch.empty_like(tokens.x[:7]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_fla_agrees() -> None:
    gla = pytest.importorskip("fla.ops.simple_gla")
    shape, lengths = Shape(8, 2, 64, 128), [70, 200, 1]
    layer = Layer.random(shape, device="cuda")
    tokens = Tokens.random(271, shape, dtype=torch.bfloat16, device="cuda")
    plan = Plan.of(lengths, [1, 2, 3], [1, 2, 3], spare=0, chunk_size=64, device="cuda")
    dt = F.softplus(tokens.dt.float() + layer.dt_bias).clamp(layer.dt_min, layer.dt_max)
    expected, final = gla.chunk_simple_gla(
        tokens.c.repeat_interleave(4, 1)[None],
        tokens.b.repeat_interleave(4, 1)[None],
        (tokens.x * dt[..., None]).to(torch.bfloat16)[None],
        (-layer.a_log.exp() * dt)[None],
        scale=1.0,
        initial_state=layer.state[1:4].transpose(2, 3).contiguous(),
        output_final_state=True,
        cu_seqlens=plan.cu_seqlens.long(),
    )
    out = run(tokens, layer, plan, 64)
    assert_close(out, expected[0] + layer.d[:, None] * tokens.x, torch.bfloat16)
    assert_close(layer.state[1:4], final.transpose(2, 3), torch.bfloat16)
