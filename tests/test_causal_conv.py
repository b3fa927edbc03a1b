"""The causal convolution equals a loop over tokens, whatever the packing."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import CHUNK, Plan

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture
from breakgraph.kernels.causal_conv import (
    _extend_special,
    _kernels,
    causal_conv,
    causal_conv_reference,
    causal_conv_step,
    causal_conv_step_reference,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass
class Layer:
    weight: torch.Tensor
    bias: torch.Tensor | None
    conv_state: torch.Tensor

    @classmethod
    def random(
        cls,
        channels: int,
        width: int = 4,
        *,
        slots: int = 7,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Layer:
        draw = torch.Generator().manual_seed(channels)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw).to(device, dtype)

        layers = normal(slots, 2, width - 1, channels)  # slots of all layers lie side by side
        return cls(normal(channels, width), normal(channels) if bias else None, layers[:, 1])

    def copy(self) -> Layer:
        return replace(self, conv_state=self.conv_state.clone())


def rows_of(
    rows: int, channels: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    """A view of wider rows, as a model's is; what lies outside of it is NaN."""
    draw = torch.Generator().manual_seed(rows)
    wide = torch.full((rows, channels + 24), float("nan"))
    wide[:, 16 : 16 + channels] = torch.randn(rows, channels, generator=draw)
    return wide.to(device, dtype)[:, 16 : 16 + channels]


def by_token(
    x: torch.Tensor, layer: Layer, plan: Plan, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``out`` and ``conv_state`` should be, in float64."""
    weight, out, state = layer.weight.double(), out.clone(), layer.conv_state.clone()
    history = weight.shape[1] - 1
    bounds = plan.cu_seqlens.tolist()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        window = [torch.zeros_like(x[0])] * history
        if plan.initial_slots[i] >= 0:
            window = list(layer.conv_state[plan.initial_slots[i]])
        for row in range(begin, end):
            window = [*window, x[row]][-history - 1 :]
            y = (torch.stack(window, 1).double() * weight).sum(1)
            y = y if layer.bias is None else y + layer.bias.double()
            out[row] = y * y.sigmoid()
            window = window[1:]
        state[plan.final_slots[i]] = torch.stack(window)
    return out, state


def run(x: torch.Tensor, layer: Layer, plan: Plan, chunk_size: int = CHUNK) -> torch.Tensor:
    out = torch.full(x.shape, 7.0, dtype=x.dtype, device=x.device)
    causal_conv(
        *(x, layer.weight, layer.bias, layer.conv_state, plan.cu_seqlens, plan.initial_slots),
        *(plan.final_slots, plan.chunks, chunk_size, out),
    )
    return out


def assert_right(x: torch.Tensor, layer: Layer, plan: Plan, chunk_size: int = CHUNK) -> None:
    """``layer.conv_state`` is left as the op leaves it."""
    expected, state = by_token(x, layer, plan, torch.full_like(x, 7.0))
    out = run(x, layer, plan, chunk_size)
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.conv_state, state, rtol=0, atol=0)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    continued=st.lists(st.booleans(), min_size=5, max_size=5),
    width=st.integers(2, 5),
    bias=st.booleans(),
    moved=st.booleans(),
)
@settings(max_examples=50)
def test_any_batch(
    lengths: list[int], continued: list[bool], width: int, bias: bool, moved: bool
) -> None:
    final = list(range(1, len(lengths) + 1))
    initial = [slot if old else -1 for slot, old in zip(final, continued, strict=False)]
    if moved:
        final = [slot % 6 + 1 for slot in final]
        initial = [0 if slot >= 0 else -1 for slot in initial]
    layer = Layer.random(5, width, bias=bias)
    assert_right(rows_of(sum(lengths) + 2, 5), layer, Plan.of(lengths, initial, final))


@pytest.mark.parametrize("piece", [1, 2, 7, 64])
def test_a_sequence_in_pieces_is_the_sequence(piece: int) -> None:
    x, layer = rows_of(100, 6), Layer.random(6)
    pieces, whole = layer.copy(), run(x, layer, Plan.of([100], [-1], [3]))
    for begin in range(0, 100, piece):
        part = x[begin : begin + piece]
        out = run(part, pieces, Plan.of([len(part)], [3 if begin else -1], [3]))
        torch.testing.assert_close(out, whole[begin : begin + piece])
    torch.testing.assert_close(pieces.conv_state[3], layer.conv_state[3], rtol=0, atol=0)


def test_neighbours_do_not_matter() -> None:
    lengths = [3, 30, 1, 17]
    x, layer = rows_of(51, 6), Layer.random(6)
    alone = layer.copy()
    outs = run(x, layer, Plan.of(lengths, [1, -1, 3, 4], [1, 2, 3, 4])).split(lengths)
    for i, mine in enumerate(x.split(lengths)):
        slot = i + 1
        out = run(mine, alone, Plan.of([lengths[i]], [-1 if i == 1 else slot], [slot]))
        assert torch.equal(out, outs[i])
    assert torch.equal(alone.conv_state, layer.conv_state)


def test_a_step_is_a_sequence_of_one_token() -> None:
    x, layer = rows_of(4, 6), Layer.random(6)
    other, slots = layer.copy(), [5, 1, 6, 2]
    expected = run(x, layer, Plan.of([1] * 4, slots, slots))
    out = torch.empty(4, 6)
    causal_conv_step(x, other.weight, other.bias, other.conv_state, torch.tensor(slots), out)
    torch.testing.assert_close(out, expected)
    assert torch.equal(other.conv_state, layer.conv_state)


def test_padded_steps_may_share_a_slot() -> None:
    x, layer = rows_of(4, 6), Layer.random(6)
    before, out = layer.copy(), torch.empty(4, 6)
    slots = torch.tensor([2, 0, 0, 0])
    causal_conv_step(x, layer.weight, layer.bias, layer.conv_state, slots, out)
    assert out.isfinite().all() and layer.conv_state[0].isfinite().all()
    untouched = [1, 3, 4, 5, 6]
    assert torch.equal(before.conv_state[untouched], layer.conv_state[untouched])


def test_a_captured_call_reads_the_plan_at_replay() -> None:
    x, layer = rows_of(40, 6), Layer.random(6)
    fixed = Plan.of([5, 30], [-1, 2], [1, 2], spare=3, padding_chunks=4)
    second = Plan.of([20, 1, 15], [4, 1, -1], [4, 1, 2], spare=2, padding_chunks=3)
    graph, out = BreakableCUDAGraph(), torch.empty(40, 6)
    with BreakableCUDAGraphCapture(graph, device="cpu"):
        causal_conv(
            *(x, layer.weight, layer.bias, layer.conv_state, fixed.cu_seqlens),
            *(fixed.initial_slots, fixed.final_slots, fixed.chunks, CHUNK, out),
        )
    fixed.copy_(second)
    out.fill_(7.0)
    expected, state = by_token(x, layer, second, out)
    graph.replay()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.conv_state, state)


def test_without_triton_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        _kernels()


def test_what_the_kernel_would_misread_is_refused() -> None:
    with pytest.raises(ValueError, match="dense last dimension"):
        _extend_special((6, 4), True, 64, (12, 2), (4, 1), (18, 6, 1), (6, 1))
    with pytest.raises(ValueError, match=r"tiles of 16 rows .* the 20 taps"):
        _extend_special((6, 20), True, 64, (6, 1), (20, 1), (114, 6, 1), (6, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "width", "bias"), [(10240, 4, True), (129, 2, False), (7, 5, True), (384, 3, True)]
)
def test_kernel_equals_reference(dtype: torch.dtype, channels: int, width: int, bias: bool) -> None:
    where: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    for lengths in ([1], [2, 0, 130, 64, 3], [65, 1, 1, 1]):
        slots = list(range(1, len(lengths) + 1))
        initial = [-1 if slot == 3 else slot for slot in slots]
        for chunk_size in (16, 64):
            plan = Plan.of(lengths, initial, slots, chunk_size=chunk_size, device="cuda")
            layer = Layer.random(channels, width, bias=bias, **where)
            expected = layer.copy()
            x = rows_of(sum(lengths) + 2, channels, **where)
            out = run(x, layer, plan, chunk_size)
            wanted = torch.full_like(out, 7.0)
            causal_conv_reference(
                *(x, layer.weight, layer.bias, expected.conv_state, plan.cu_seqlens),
                *(plan.initial_slots, plan.final_slots, plan.chunks, chunk_size, wanted),
            )
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
            assert torch.equal(layer.conv_state, expected.conv_state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "width"), [(10240, 4), (129, 2), (7, 5)])
def test_step_kernel_equals_reference(dtype: torch.dtype, channels: int, width: int) -> None:
    where: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    layer, x = Layer.random(channels, width, **where), rows_of(6, channels, **where)
    expected, slots = layer.copy(), torch.tensor([5, 2, 1, 0, 0, 0], device="cuda")
    out, wanted = (torch.full(x.shape, 7.0, **where) for _ in range(2))
    causal_conv_step(x, layer.weight, layer.bias, layer.conv_state, slots, out)
    causal_conv_step_reference(
        x, expected.weight, expected.bias, expected.conv_state, slots, wanted
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[:3], wanted[:3], rtol=tolerance, atol=tolerance)
    assert out.isfinite().all() and layer.conv_state.isfinite().all()
    assert torch.equal(layer.conv_state[1:], expected.conv_state[1:])


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_plan_at_replay() -> None:
    x, layer = rows_of(200, 70, device="cuda"), Layer.random(70, device="cuda")
    where: dict[str, Any] = {"chunk_size": 64, "device": "cuda"}
    fixed = Plan.of([5], [-1], [1], spare=4, padding_chunks=5, **where)
    out = torch.full(x.shape, 7.0, device="cuda")
    arguments = (
        *(x, layer.weight, layer.bias, layer.conv_state, fixed.cu_seqlens, fixed.initial_slots),
        *(fixed.final_slots, fixed.chunks, 64, out),
    )
    causal_conv(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        causal_conv(*arguments)
    for plan in (
        Plan.of([66, 64, 2, 1], [1, -1, 3, 4], [1, 2, 3, 5], spare=1, padding_chunks=1, **where),
        Plan.of([200], [2], [2], spare=4, padding_chunks=2, **where),
    ):
        fixed.copy_(plan)
        out.fill_(7.0)
        expected, state = by_token(x, layer, plan, out)
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.conv_state, state)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    x, layer = rows_of(70, 64, device="cuda"), Layer.random(64, device="cuda")
    plan, slots = Plan.of([70], [1], [1], device="cuda"), torch.arange(7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, layer, plan)
        causal_conv_step(
            x[:7], layer.weight, layer.bias, layer.conv_state, slots, torch.empty_like(x[:7])
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
