"""A gated product of many rows, activated at its end, equals the product and its activation."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from breakgraph.kernels import gated_products_cuda
from breakgraph.kernels.gated_products import gated_product, serves_gated
from breakgraph.kernels.gated_products_cuda import (
    SOURCE,
    TILES,
    Tile,
    best_tile,
    product_source,
)
from breakgraph.layers import GatedMLP
from breakgraph.layers.own_products import GATED_ROWS, use_own_products

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
SHARED_BYTES, SUMS = 232448, 192  # of a block; a thread's of 240 registers


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


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_tile_fits_a_block(tile: Tile) -> None:
    assert tile.shared_bytes <= SHARED_BYTES
    assert tile.rows // 128 * tile.columns <= SUMS
    assert tile.rows % 128 == tile.columns % 32 == 0


@pytest.mark.parametrize(
    ("rows", "features", "tile"),
    [
        (2048, 12288, TILES[0]),
        (512, 12288, TILES[0]),
        (512, 3072, TILES[2]),
        (1024, 3072, TILES[0]),
    ],
)
def test_the_tile_of_the_fewest_waves_is_taken(rows: int, features: int, tile: Tile) -> None:
    assert best_tile(rows, features, clusters=66) == tile


def test_an_instruction_names_each_sum_once() -> None:
    source = product_source(96)
    assert "m64n192k16" in source
    assert source.count("+f") == 96
    assert "multiply(sum[p]" in SOURCE.read_text(encoding="utf-8")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "size", "features"),
    [
        (1, 8, 8),
        (128, 64, 96),
        (129, 72, 200),
        (77, 1000, 24),
        (513, 4096, 1024),
        (3000, 1024, 3072),  # more tiles than blocks, and the last group of tiles is not full
        (5000, 256, 5000),
    ],
)
def test_the_kernel_equals_its_parts_and_itself(rows: int, size: int, features: int) -> None:
    x, weight = inputs(rows, size, features, torch.bfloat16, "cuda")
    assert serves_gated(weight)
    assert_equals_its_parts(x, weight)
    assert torch.equal(gated_product(x, weight), gated_product(x, weight))


@pytest.mark.gpu
def test_every_tile_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(700, 320, 1000, torch.bfloat16, "cuda")
    found = []
    for tile in TILES:
        gated_products_cuda._plan.cache_clear()
        monkeypatch.setattr(gated_products_cuda, "best_tile", lambda *sizes, tile=tile: tile)
        assert_equals_its_parts(x, weight)
        found.append(gated_product(x, weight))
    gated_products_cuda._plan.cache_clear()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.gpu
def test_what_the_copy_engine_cannot_address_is_copied_or_not_served() -> None:
    weight = inputs(1, 64, 96, torch.bfloat16, "cuda")[1]
    x = torch.randn(65, 67, device="cuda").bfloat16()[:, 3:]
    assert_equals_its_parts(x, weight)
    assert gated_product(x[:0], weight).shape == (0, 96)
    assert not serves_gated(weight[:, :60].contiguous())
    assert not serves_gated(weight[:, :32])
    assert not serves_gated(weight.half())


@pytest.mark.gpu
def test_a_thread_that_asked_cuda_for_nothing_launches() -> None:
    x, weight = inputs(65, 64, 96, torch.bfloat16, "cuda")
    wanted, found = gated_product(x, weight), []
    thread = threading.Thread(target=lambda: found.append(gated_product(x, weight)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted)


@pytest.mark.gpu
def test_a_kernel_is_compiled_once_for_all_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cubin = gated_products_cuda._cubin.__wrapped__
    made = cubin(TILES[2])
    (kept,) = (tmp_path / "breakgraph").iterdir()
    assert kept.read_bytes() == made
    monkeypatch.setattr(gated_products_cuda, "_compiled", None)
    assert cubin(TILES[2]) == made


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
    rows = GATED_ROWS
    assert block.gate_up_proj.gated_rows == rows
    x = torch.randn(rows, 64, device="cuda").bfloat16()
    residual = torch.randn(rows, 64, device="cuda").bfloat16()
    found = block(x, residual.clone())
    use_own_products(block, wanted=False)
    assert block.gate_up_proj.gated_rows > rows
    torch.testing.assert_close(found, block(x, residual.clone()), rtol=1.6e-2, atol=1.6e-2)
