"""A capture tells apart ops that only describe memory, and lets them pass."""

import pytest
import torch

from breakgraph.graph import CaptureAudit, ForeignReadError
from breakgraph.graph.op_traits import traits_of

from .support import SHAPE, capture

aten = torch.ops.aten


@pytest.mark.parametrize(
    "op",
    [
        *(aten.t.default, aten.view.default, aten.split.Tensor, aten.split_with_sizes.default),
        *(aten.slice.Tensor, aten.expand.default, aten.as_strided.default, aten.detach.default),
        *(aten.unbind.int, aten._conj.default),
    ],
    ids=str,
)
def test_views_are_known(op):
    traits = traits_of(op)
    assert traits.gives_views
    assert not traits.refusable
    assert traits_of(op) is traits


@torch.library.custom_op("breakgraph_tests::says_it_views", mutates_args=())
def says_it_views(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.mark.parametrize(
    "op",
    [
        *(aten.mm.default, aten.t_.default, aten.add_.Tensor, aten._unsafe_view.default),
        *(aten.reshape.default, aten.contiguous.default, aten.to.dtype),  # these may copy
        *(aten.empty_like.default, aten.set_.source_Storage, aten._assert_async.msg),
        torch.ops.breakgraph_tests.says_it_views.default,
    ],
    ids=str,
)
def test_everything_else_is_looked_at(op):
    assert not traits_of(op).gives_views


def test_a_view_of_a_foreign_tensor_is_refused_when_it_is_read(device):
    x, foreign = torch.ones(SHAPE, device=device), torch.ones(SHAPE, device=device)
    audit = CaptureAudit([x])
    capture(lambda: (foreign.t(), x + 1)[1], device, audit=audit)
    with pytest.raises(ForeignReadError, match="mul"):
        capture(lambda: foreign.t()[0] * 2, device, audit=audit)
