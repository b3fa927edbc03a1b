"""A gated product of many rows, activated at its end, equals the product and its activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from breakgraph.kernels.gated_products import COLUMNS, ROWS, gated_product, serves_gated
from breakgraph.layers import GatedMLP
from breakgraph.layers.own_products import gated_rows, use_own_products

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def inputs(
    rows: int, size: int, features: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a wider tensor, and the weights of a gate and of what it gates."""
    x = torch.randn(rows, size + 16, device=device).to(dtype)[:, :size]
    return x, (torch.randn(2 * features, size, device=device) * size**-0.5).to(dtype)


def assert_equals_its_parts(x: torch.Tensor, weight: torch.Tensor) -> None:
    gate, up = F.linear(x.double(), weight.double()).chunk(2, dim=1)
    wanted, found = F.silu(gate) * up, gated_product(x, weight)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert (found.double() - wanted).norm() <= TOLERANCE[x.dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_equals_its_parts(dtype: torch.dtype) -> None:
    assert_equals_its_parts(*inputs(5, 40, 9, dtype, "cpu"))


def test_rows_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"call \.contiguous\(\) first"):
        gated_product(torch.zeros(4, 3).T, torch.zeros(2, 4))


def test_nothing_is_served_on_a_cpu() -> None:
    block = GatedMLP(16, 8)
    use_own_products(block)
    assert not serves_gated(block.gate_up_proj.weight)
    assert block.gate_up_proj.gated_rows > 2**40


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "size", "features"),
    [
        (1, 8, 8),
        (ROWS, 64, COLUMNS),
        (ROWS + 1, 72, COLUMNS + 8),
        (77, 1000, 24),
        (3000, 1024, 3072),  # more tiles than programs, and the last group of tiles is not full
        (2500, 256, 5000),
    ],
)
def test_the_kernel_equals_its_parts_and_itself(
    rows: int, size: int, features: int, dtype: torch.dtype
) -> None:
    x, weight = inputs(rows, size, features, dtype, "cuda")
    assert serves_gated(weight)
    assert_equals_its_parts(x, weight)
    assert torch.equal(gated_product(x, weight), gated_product(x, weight))


@pytest.mark.gpu
def test_what_tensor_memory_cannot_address_is_not_served() -> None:
    weight = torch.zeros(16, 12, device="cuda", dtype=torch.bfloat16)
    assert not serves_gated(weight)
    assert not serves_gated(weight[:, :8])
    assert not serves_gated(weight.float())


@pytest.mark.gpu
def test_a_captured_product_reads_its_inputs_at_replay() -> None:
    x, weight = inputs(300, 128, 64, torch.bfloat16, "cuda")
    gated_product(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gated_product(x, weight)
    x.normal_()
    graph.replay()
    assert torch.equal(out, gated_product(x, weight))


@pytest.mark.gpu
@torch.no_grad()
def test_a_feed_forward_block_takes_it_from_so_many_rows_on() -> None:
    block = GatedMLP(64, 48).to("cuda", torch.bfloat16)
    for parameter in block.parameters():
        parameter.normal_(0, 0.1)
    use_own_products(block)
    rows = gated_rows(64)
    assert block.gate_up_proj.gated_rows == rows
    x = torch.randn(rows, 64, device="cuda").bfloat16()
    residual = torch.randn(rows, 64, device="cuda").bfloat16()
    found = block(x, residual.clone())
    use_own_products(block, wanted=False)
    assert block.gate_up_proj.gated_rows > rows
    torch.testing.assert_close(found, block(x, residual.clone()), rtol=1.6e-2, atol=1.6e-2)
