"""Rows of a table, cast, are those that torch selects."""

from __future__ import annotations

import pytest
import torch

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture
from breakgraph.kernels.gather import gather_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "shape"), [(1, (3,)), (16, (2, 64)), (300, (2049,)), (0, (4,))])
def test_rows_equal_those_that_torch_selects(
    rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    table = torch.randn(50, *shape, device=device)
    index = torch.randint(0, 50, (rows,), device=device)
    expected = table.index_select(0, index).to(dtype)
    assert torch.equal(gather_rows(table, index, dtype=dtype), expected)
    out = torch.full_like(expected, 7.0)
    assert gather_rows(table, index, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(gather_rows(table, index), table.index_select(0, index))


@pytest.mark.parametrize("device", DEVICES)
def test_entries_may_lie_apart(device: str) -> None:
    table = torch.randn(9, 40, device=device)[:, :24]
    index = torch.tensor([8, 0, 8], device=device)
    assert torch.equal(gather_rows(table, index), table[index])


def test_layouts_with_gaps_and_other_shapes_are_refused() -> None:
    index = torch.tensor([1, 0])
    for table, out in (
        (torch.zeros(3, 4).T, None),
        (torch.zeros(3, 4), torch.zeros(2, 5)),
        (torch.zeros(3, 4), torch.zeros(4, 2).T),
    ):
        with pytest.raises(ValueError, match="and contiguous"):
            gather_rows(table, index, out=out)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_captured_gather_reads_its_index_at_replay(device: str) -> None:
    table, index = torch.randn(9, 8, device=device), torch.tensor([1, 2], device=device)
    gather_rows(table, index)
    graph = BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph, device=device):
        found = gather_rows(table, index)
    index.copy_(torch.tensor([7, 0], device=device))
    graph.replay()
    assert torch.equal(found, table[[7, 0]])
