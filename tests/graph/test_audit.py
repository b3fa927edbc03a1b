"""An audited capture reads weights, static buffers, constants and its own tensors only."""

import pytest
import torch
import torch.nn.functional as F

from breakgraph.graph import CaptureAudit, ForeignReadError, RefusedOpError, eager_on_graph

from .support import SHAPE, capture, mix, mixed, poison


def audited(fn, device, *allowed):
    return capture(fn, device, audit=CaptureAudit(allowed))


def test_a_foreign_read_in_a_segment_is_refused(device):
    x, foreign = torch.ones(SHAPE, device=device), torch.ones(3, 1, 8, device=device)
    with pytest.raises(ForeignReadError) as error:
        audited(lambda: x + foreign, device, x)
    message = str(error.value)
    for part in ("aten.add.Tensor", "[3, 1, 8]", "float32", device, "test_audit.py"):
        assert part in message
    assert "static input buffers" in message


def test_a_foreign_read_through_a_view_or_an_in_place_op_is_refused(device):
    x, foreign = torch.ones(SHAPE, device=device), torch.ones(SHAPE, device=device)
    for fn in (
        lambda: x + foreign[1:2].t().t(),
        lambda: x.add_(foreign),
        lambda: foreign.mul_(2),
        lambda: torch.cat([x, foreign]),
        lambda: torch.add(x, x, out=foreign),
        lambda: x.where(foreign > 0, x),
    ):
        with pytest.raises(ForeignReadError):
            audited(fn, device, x)


def test_a_foreign_argument_of_a_break_is_refused(device):
    x, foreign = torch.ones(SHAPE, device=device), torch.ones(3, 8, device=device)
    out = torch.empty(SHAPE, device=device)
    for fn in (lambda: mix(x * 2, foreign), lambda: mixed(x=foreign)):
        with pytest.raises(ForeignReadError, match=r"break mix.*\[3, 8\].*test_audit\.py"):
            audited(fn, device, x)
    with pytest.raises(ForeignReadError, match="break mix reads"):
        audited(lambda: mix(x * 2, out), device, x)


def test_a_tensor_that_a_break_leaves_behind_is_foreign(device):
    left = []

    @eager_on_graph()
    def leave(x):
        left.append(x + 1)

    x = torch.ones(SHAPE, device=device)

    def fn():
        leave(x * 2)
        return x + left[0]

    with pytest.raises(ForeignReadError):
        audited(fn, device, x)


def test_what_may_be_read_passes(device):
    linear = torch.nn.Linear(8, 8).to(device)
    x, cache = torch.randn(SHAPE, device=device), torch.zeros(16, 8, device=device)
    slots = torch.tensor([5, 4, 3, 2], device=device)
    static = torch.zeros(16, 8, device=device)

    def fn():
        y = linear(x) * torch.tensor(3.0) + torch.arange(8, device=device)
        cache.index_copy_(0, slots, y)
        out = torch.zeros_like(y)
        mix(cache[slots], out)
        static[:4].copy_(out.t().contiguous().t() + mixed(y.view(2, -1)).view(4, 8))
        return static[2:][:2] * torch.ones((), device=device)

    graph, out = audited(fn, device, *linear.parameters(), x, cache.view(-1), slots, static)
    x.copy_(torch.randn_like(x))
    poison(graph)
    graph.replay()
    result = out.clone()
    torch.testing.assert_close(result, fn().detach())


def test_without_an_audit_a_foreign_read_is_held_instead(device):
    x, foreign = torch.ones(SHAPE, device=device), torch.ones(SHAPE, device=device)
    graph, out = capture(lambda: x + foreign, device)
    foreign.fill_(5)
    graph.replay()
    assert out.eq(6).all()


def attention(rank):
    def fn(x):
        q = x.view(1, 1, *x.shape[-2:])[(0,) * (4 - rank)]
        return F.scaled_dot_product_attention(q, q, q)

    return fn


@pytest.mark.parametrize("rank", [4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_inside_a_segment_is_refused(rank, dtype, device):
    """Also where torch computes it by plain matrix products."""
    x = torch.randn(SHAPE, device=device, dtype=dtype)
    fn = attention(rank)
    with pytest.raises(RefusedOpError, match=r"attention.*test_audit\.py.*eager_on_graph"):
        audited(lambda: fn(x), device, x)
    graph, out = audited(lambda: eager_on_graph()(fn)(x * 1), device, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, fn(x))


@pytest.mark.parametrize(
    "attend",
    [
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[:, :4] > 0),
        lambda x: torch.ops.aten._scaled_dot_product_attention_math(x, x, x),
    ],
)
def test_attention_by_plain_products_is_refused_whatever_its_options(attend, device):
    x = torch.randn(SHAPE, device=device, dtype=torch.float64)
    with pytest.raises(RefusedOpError, match="scaled_dot_product_attention mixes"):
        audited(lambda: attend(x), device, x)


@torch.library.custom_op("torch_attn::breakgraph_tests_mixer", mutates_args=())
def varlen_like(x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(0)


def test_the_variable_length_attention_of_torch_is_refused(device):
    x = torch.randn(SHAPE, device=device)
    with pytest.raises(RefusedOpError, match="torch_attn"):
        audited(lambda: varlen_like(x), device, x)


def test_without_an_audit_attention_may_be_captured(device):
    x = torch.randn(SHAPE, device=device)
    graph, out = capture(lambda: attention(4)(x), device)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, attention(4)(x))
