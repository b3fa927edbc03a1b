"""Linear layers know their weight as it is now, and hand torch one op for each product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from breakgraph.layers import GatedMLP, Linear


class Ops(TorchDispatchMode):
    """Notes the name of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_that_moved_is_seen(bias: bool) -> None:
    layer = filled(Linear(6, 4, bias=bias))
    x = torch.randn(3, 6)

    def check() -> None:
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.add_to(torch.ones(3, 4), x), expected + 1)

    check()
    layer.weight.data = torch.randn(4, 6)
    check()
    layer.weight = torch.nn.Parameter(torch.randn(4, 6), requires_grad=False)
    check()
    layer.weight.mul_(2)
    check()


@torch.no_grad()
def test_the_view_of_a_weight_is_no_state_of_the_model() -> None:
    layer = filled(Linear(6, 4))
    layer(torch.randn(3, 6))
    assert list(layer.state_dict()) == ["weight"]
    assert layer.double()(torch.randn(3, 6).double()).dtype == torch.float64


@torch.no_grad()
def test_a_feed_forward_block_is_three_ops() -> None:
    """A capture stops at each op, at views too."""
    block = filled(GatedMLP(8, 12))
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    block(x, residual)
    with Ops() as ops:
        block(x, residual)
    assert ops.names == ["aten::mm", "breakgraph::silu_mul", "aten::addmm_"]


@torch.no_grad()
@pytest.mark.parametrize(("rows", "eps", "gated"), [(3, None, 0), (4, None, 1), (4, 1e-6, 0)])
def test_a_gated_product_of_many_rows_that_are_normalised_is_one_op(
    rows: int, eps: float | None, gated: int
) -> None:
    layer = filled(GatedMLP(8, 12)).gate_up_proj
    layer.gated_rows = 4
    x = torch.randn(rows, 8)
    layer(x, eps)
    with Ops() as ops:
        layer(x, eps)
    apart = ["aten::mm", "breakgraph::silu_mul"]
    assert ops.names == (["breakgraph::gated_product"] if gated else apart)
