"""Routed experts by kernels of our own: each op keeps its contract, together they equal experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture, CaptureAudit
from breakgraph.kernels import routed_experts_cuda
from breakgraph.kernels.routed_experts import (
    routed_down,
    routed_up,
    sort_routes,
    sort_routes_reference,
    sum_routed,
)
from breakgraph.layers.moe_experts import Experts, GatedExperts, PlainExperts

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KINDS = [GatedExperts, PlainExperts]


def experts_of(
    kind: type[Experts],
    count: int,
    size: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Experts:
    experts = kind(count, size, inner)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.2).to(device, dtype)
    return experts


def routing(rows: int, count: int, top_k: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Weights and experts of each row."""
    weights, experts = torch.randn(rows, count, device=device).softmax(-1).topk(top_k, sorted=False)
    return weights, experts


def live_rows(count: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([count], dtype=torch.int32, device=device)


def run(
    layer: Experts, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, live: int
) -> torch.Tensor:
    """The four ops one after the other."""
    gated, total = len(layer.parts) == 2, len(layer.up)
    routes = sort_routes(experts, live_rows(live, x.device.type), 0, total)
    hidden = routed_up(x, routes.rows, routes.offsets, layer.up, gated=gated, spread=total)
    routed = routed_down(hidden, routes.offsets, layer.down, spread=total)
    return sum_routed(routed, routes.places, weights)


def exact(
    layer: Experts, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, live: int
) -> torch.Tensor:
    """The weighted sum of the first ``live`` rows, in float64 and row by row."""
    x, weights, experts = x[:live].double().cpu(), weights[:live].double().cpu(), experts[:live]
    mixed = torch.zeros_like(x)
    for row, (shares, chosen) in enumerate(zip(weights, experts.cpu(), strict=True)):
        for share, expert in zip(shares, chosen.tolist(), strict=True):
            up, down = (w[expert].double().cpu() for w in (layer.up, layer.down))
            projected = F.linear(x[row], up)
            if isinstance(layer, GatedExperts):
                gate, value = projected.chunk(2)
                projected = F.silu(gate) * value
            else:
                projected = projected.relu().square()
            mixed[row] += share * F.linear(projected, down)
    return mixed


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    if len(wanted):
        error = (found.double().cpu() - wanted).norm() / wanted.norm()
        assert error < TOLERANCE[dtype]


@given(
    choices=st.lists(st.permutations(range(6)), max_size=9),
    top_k=st.integers(1, 4),
    padding=st.integers(0, 9) | st.none(),
    shard=st.sampled_from([(0, 6), (0, 3), (3, 3), (2, 1)]),
)
def test_routes_are_in_the_order_of_experts_then_rows(
    choices: list[list[int]], top_k: int, padding: int | None, shard: tuple[int, int]
) -> None:
    experts = torch.tensor(choices, dtype=torch.int64).view(-1, 6)[:, :top_k].contiguous()
    live = len(experts) - min(padding or 0, len(experts))
    first, count = shard
    given_live = None if padding is None else live_rows(live)
    rows, offsets, places = sort_routes(experts, given_live, first, count)
    pairs = sorted(
        (int(experts[row, choice]) - first, row, choice)
        for row in range(live)
        for choice in range(top_k)
        if first <= experts[row, choice] < first + count
    )
    assert rows[: len(pairs)].tolist() == [row for _, row, _ in pairs]
    assert offsets.tolist() == [sum(e <= expert for e, _, _ in pairs) for expert in range(count)]
    wanted = torch.full_like(places, -1)
    for place, (_, row, choice) in enumerate(pairs):
        wanted[row, choice] = place
    assert torch.equal(places, wanted)
    assert rows.dtype == offsets.dtype == places.dtype == torch.int32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15)
@given(
    rows=st.integers(1, 9), size=st.integers(1, 20), inner=st.integers(1, 20), cut=st.integers(0, 9)
)
def test_the_ops_together_equal_the_experts_row_by_row(
    kind: type[Experts], dtype: torch.dtype, rows: int, size: int, inner: int, cut: int
) -> None:
    torch.manual_seed(rows)
    layer, x = experts_of(kind, 5, size, inner, dtype), torch.randn(rows, size).to(dtype)
    weights, experts = routing(rows, 5, 3)
    live = max(0, rows - cut)
    x[live:], weights[live:] = float("nan"), float("nan")
    found = run(layer, x, weights, experts, live)
    assert torch.equal(found[live:], torch.zeros_like(found[live:]))
    wanted = exact(layer, x, weights, experts, live)
    scale = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-3)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * scale
    torch.testing.assert_close(found[:live].double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_captured_call_serves_every_later_routing() -> None:
    layer, x, count = experts_of(GatedExperts, 6, 16, 8), torch.randn(7, 16), live_rows(7)
    weights, experts = routing(7, 6, 2)
    graph = BreakableCUDAGraph()
    audit = CaptureAudit([x, weights, experts, count, *layer.parameters()])
    with torch.no_grad(), BreakableCUDAGraphCapture(graph, device="cpu", audit=audit):
        out = layer(x, weights, experts, count)
    for live in (7, 0, 3, 7):
        for static, value in zip((weights, experts), routing(7, 6, 2), strict=True):
            static.copy_(value)
        x.normal_()
        count.fill_(live)
        graph.pool().poison()
        graph.replay()
        assert torch.equal(out, layer(x, weights, experts, count))


def test_a_new_layout_launches_every_variant_once_and_the_chosen_last() -> None:
    key, variants = ("a layout that nothing else has",), (1, 2, 2)
    assert routed_experts_cuda._launches(key, variants, 1) == (1, 2, 1)
    assert routed_experts_cuda._launches(key, variants, 2) == (2,)


# On a GPU -----------------------------------------------------------------------------------

SHAPES = [  # experts, size, intermediate, rows, top_k, live rows
    (8, 32, 16, 7, 3, 5),
    (16, 77, 51, 33, 4, 33),
    (4, 64, 48, 300, 2, 0),
    (16, 256, 96, 390, 8, 380),
]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_kernels_equal_experts_and_themselves(
    kind: type[Experts], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    count, size, inner, rows, top_k, live = shape
    layer = experts_of(kind, count, size, inner, dtype, "cuda")
    x = torch.randn(rows, size, device="cuda", dtype=dtype)
    weights, experts = routing(rows, count, top_k, "cuda")
    x[live:], weights[live:] = float("nan"), float("nan")
    found = run(layer, x, weights, experts, live)
    assert torch.equal(found, run(layer, x, weights, experts, live))
    assert torch.equal(found[live:], torch.zeros_like(found[live:]))
    assert_near(found[:live], exact(layer, x, weights, experts, live), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 40, 700])
@pytest.mark.parametrize("shard", [(0, 32), (8, 8)])
def test_sorting_on_a_gpu_equals_the_reference(rows: int, shard: tuple[int, int]) -> None:
    experts = routing(rows, 32, 8, "cuda")[1]
    for live in (None, rows // 2):
        count = None if live is None else live_rows(live, "cuda")
        found = sort_routes(experts, count, *shard)
        on_cpu = None if live is None else live_rows(live)
        wanted = sort_routes_reference(experts.cpu(), on_cpu, *shard)
        kept = int(wanted[1][-1])
        assert torch.equal(found.rows[:kept].cpu(), wanted[0][:kept])
        assert torch.equal(found.offsets.cpu(), wanted[1])
        assert torch.equal(found.places.cpu(), wanted[2])


@pytest.mark.gpu
@torch.no_grad()
def test_a_capture_after_a_warm_up_of_other_row_counts_serves_every_routing() -> None:
    layer = experts_of(GatedExperts, 8, 64, 32, torch.bfloat16, "cuda")
    run_with = [(torch.randn(rows, 64, device="cuda").bfloat16(), rows) for rows in (600, 96)]
    for x, rows in run_with:
        weights, experts = routing(rows, 8, 2, "cuda")
        count, graph = live_rows(rows, "cuda"), torch.cuda.CUDAGraph()
        if rows == 600:
            layer(x, weights, experts, count)
            continue
        with torch.cuda.graph(graph):
            out = layer(x, weights, experts, count)
        for live in (rows, 0, 33):
            for static, value in zip((weights, experts), routing(rows, 8, 2, "cuda"), strict=True):
                static.copy_(value)
            count.fill_(live)
            graph.replay()
            assert_near(out[:live], exact(layer, x, weights, experts, live), torch.bfloat16)
