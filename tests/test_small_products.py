"""Products of a few rows by kernels of our own equal torch's, with what is fused into them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture, CaptureAudit
from breakgraph.kernels.small_products import (
    Activation,
    add_small_product,
    serves,
    small_product,
)
from breakgraph.kernels.small_products_cuda import DEPTH_MULTIPLE, MAX_ROWS, plan_of
from breakgraph.layers import GatedMLP, Linear, PlainMLP
from breakgraph.layers.own_products import use_own_products

ACTIVATIONS: list[Activation] = ["none", "silu_mul", "relu_squared"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def exact(x: torch.Tensor, weight: torch.Tensor, activation: Activation) -> torch.Tensor:
    product = F.linear(x.double().cpu(), weight.double().cpu())
    if activation == "silu_mul":
        gate, up = product.chunk(2, dim=1)
        return F.silu(gate) * up
    return product if activation == "none" else product.relu().square()


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (found.double().cpu() - wanted).norm()
    assert error <= TOLERANCE[found.dtype] * wanted.norm()  # of few outputs relu may leave none


def inputs(
    rows: int, size: int, features: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a wider tensor, and a weight."""
    x = torch.randn(rows, size + 16, device=device).to(dtype)[:, :size]
    return x, (torch.randn(features, size, device=device) * size**-0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(max_examples=10)
@given(rows=st.integers(1, 9), size=st.integers(1, 40), features=st.integers(1, 9))
def test_the_reference_is_the_product_and_its_activation(
    activation: Activation, dtype: torch.dtype, rows: int, size: int, features: int
) -> None:
    x, weight = inputs(rows, size, 2 * features, dtype)
    found = small_product(x, weight, activation)
    wanted = exact(x, weight, activation)
    scale = TOLERANCE[dtype] * 4 * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=scale)


@pytest.mark.parametrize("keep", [True, False])
def test_a_sum_is_in_place_and_rounded_once(keep: bool) -> None:
    x, weight = inputs(5, 24, 7, torch.float32)
    wide = torch.randn(5, 11)
    residual, before = wide[:, :7], wide.clone()
    add_small_product(residual, x, weight, keep=keep)
    wanted = F.linear(x, weight) + (before[:, :7] if keep else 0)
    torch.testing.assert_close(residual, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, 7:], before[:, 7:])


@given(
    rows=st.integers(1, MAX_ROWS),
    features=st.integers(1, 30000),
    blocks=st.integers(1, 200),
    gated=st.booleans(),
)
def test_a_plan_fills_the_chip_once_if_it_can(
    rows: int, features: int, blocks: int, gated: bool
) -> None:
    size = blocks * DEPTH_MULTIPLE
    tile, splits = plan_of(rows, features, size, gated=gated, processors=132)
    tiles, room = -(-features // tile.columns), 132 * tile.resident
    assert tile.rows >= rows
    assert 1 <= splits <= size // tile.depth
    assert tiles * splits <= max(tiles, room)


@pytest.mark.parametrize(
    ("rows", "features", "size", "splits"),
    [
        (16, 4096, 1024, 1),
        (16, 1024, 2048, 5),
        (1, 4096, 12288, 4),
        (32, 4096, 4096, 2),
        (17, 6144, 4096, 1),
        (16, 18560, 4096, 1),
    ],
)
def test_a_depth_is_divided_as_was_measured_best(
    rows: int, features: int, size: int, splits: int
) -> None:
    assert plan_of(rows, features, size, gated=False, processors=132)[1] == splits


@pytest.mark.parametrize("rows", [3, MAX_ROWS + 1])
@pytest.mark.parametrize("block", [GatedMLP, PlainMLP])
def test_a_block_gives_the_same_with_either_product(
    block: type[GatedMLP | PlainMLP], rows: int
) -> None:
    layer, x = block(16, 24), torch.randn(rows, 16)
    for parameter in layer.parameters():
        parameter.normal_(0, 0.3)
    residual = torch.randn(rows, 16)
    usual = layer(x, residual.clone())
    for module in layer.modules():
        if isinstance(module, Linear):
            module.small_products = True
    torch.testing.assert_close(layer(x, residual.clone()), usual, rtol=1e-5, atol=1e-5)


def test_a_captured_product_reads_its_inputs_at_replay() -> None:
    x, weight = inputs(4, 32, 6, torch.float32)
    residual = torch.zeros(4, 6)
    graph = BreakableCUDAGraph()
    audit = CaptureAudit([x, weight, residual])
    with torch.no_grad(), BreakableCUDAGraphCapture(graph, device="cpu", audit=audit):
        out = small_product(x, weight, "silu_mul")
        add_small_product(residual, x, weight)
    x.normal_()
    residual.fill_(2.0)
    graph.pool().poison()
    graph.replay()
    assert torch.equal(out, small_product(x, weight, "silu_mul"))
    torch.testing.assert_close(residual, 2.0 + F.linear(x, weight))


def test_nothing_is_served_on_a_cpu() -> None:
    model = nn.Sequential(Linear(DEPTH_MULTIPLE, 8), Linear(8, 8))
    assert use_own_products(model) == 0
    assert not serves(model[0].weight)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'gelu' is none of none, silu_mul, relu_squared"):
        small_product(torch.zeros(1, 2), torch.zeros(2, 2), "gelu")  # type: ignore[arg-type]


# On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [DEPTH_MULTIPLE, 11 * DEPTH_MULTIPLE])
def test_kernels_equal_torch_and_themselves(
    activation: Activation, size: int, dtype: torch.dtype
) -> None:
    for rows, features in ((1, 2), (3, 66), (16, 128), (17, 1000), (MAX_ROWS, 6146)):
        x, weight = inputs(rows, size, features, dtype, "cuda")
        torch.cuda.synchronize()
        found = small_product(x, weight, activation)
        assert_near(found, exact(x, weight, activation))
        for _ in range(3):
            assert torch.equal(found, small_product(x, weight, activation))


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [True, False])
def test_kernels_add_to_a_strided_residual(keep: bool) -> None:
    for rows, size, features in ((1, 2048, 1024), (MAX_ROWS, 3072, 77)):
        x, weight = inputs(rows, size, features, torch.bfloat16, "cuda")
        wide = torch.randn(rows, features + 8, device="cuda").bfloat16()
        residual, before = wide[:, :features], wide.clone()
        if not keep:
            residual.fill_(float("nan"))
        add_small_product(residual, x, weight, keep=keep)
        wanted = exact(x, weight, "none") + (before[:, :features].double().cpu() if keep else 0)
        assert_near(residual, wanted)
        assert torch.equal(wide[:, features:], before[:, features:])


@pytest.mark.gpu
def test_a_chain_of_early_launches_is_in_order_in_a_graph() -> None:
    from breakgraph.kernels.norms import rms_norm

    weights = [inputs(1, 1024, 1024, torch.bfloat16, "cuda")[1] for _ in range(12)]
    ones = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    start = torch.randn(16, 1024, device="cuda").bfloat16()
    residual = start.clone()

    def chain(by_kernels: bool) -> None:
        for weight in weights:
            x = rms_norm(residual, ones, 1e-6)
            if by_kernels:
                x = small_product(x, weight)
                add_small_product(residual, x, weight)
            else:
                residual.addmm_(F.linear(x, weight), weight.t())

    chain(False)
    wanted = residual.double().cpu()
    residual.copy_(start)
    chain(True)
    eager = residual.clone()
    assert (eager.double().cpu() - wanted).norm() / wanted.norm() < 3e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(True)
    for _ in range(20):
        residual.copy_(start)
        graph.replay()
        assert torch.equal(residual, eager)


@pytest.mark.gpu
def test_more_rows_than_a_tile_holds_are_refused() -> None:
    x, weight = inputs(MAX_ROWS + 1, DEPTH_MULTIPLE, 8, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match=f"more than the {MAX_ROWS}"):
        small_product(x, weight)
