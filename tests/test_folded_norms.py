"""A norm whose weight is part of the product behind it: the same numbers, and one kernel less."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models_support import make_reference, run_prompts, save_checkpoint

from breakgraph.kernels.norms import rms_norm
from breakgraph.kernels.pointwise import silu_mul, silu_mul_reference
from breakgraph.kernels.rotary import qkv_norm_rope_store
from breakgraph.kernels.row_factor import row_factor
from breakgraph.kernels.small_products import small_product
from breakgraph.layers import GatedMLP, Linear, RMSNorm
from breakgraph.layers.norm import DEFERRED_ROWS, fold_norms
from breakgraph.models import load_model

EPS = 1e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


@torch.no_grad()
def norm_and_product(
    offset: float = 0.0, dtype: torch.dtype = torch.float32, *, bias: bool = False
) -> tuple[RMSNorm, Linear]:
    norm, product = RMSNorm(24, EPS, offset=offset).to(dtype), Linear(24, 10, bias=bias).to(dtype)
    norm.weight.normal_(1 - offset, 0.25)
    for parameter in product.parameters():
        parameter.normal_()
    return norm, product


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, DEFERRED_ROWS, DEFERRED_ROWS + 1])
def test_a_folded_norm_and_its_product_give_what_they_gave(rows: int, offset: float) -> None:
    norm, product = norm_and_product(offset)
    x = torch.randn(rows, 24) * 3
    expected = product(norm(x))
    norm.fold_into(product)
    given, eps = norm.deferred(x)
    found = product(given)
    if rows <= DEFERRED_ROWS:
        assert (given is x, eps) == (True, EPS)
        found = found * row_factor(x, EPS)
    else:
        assert eps is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(norm(x)), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_is_not_left_to_a_product_that_does_without() -> None:
    norm, product = norm_and_product()
    norm.fold_into(product)
    x = torch.randn(8, 24)
    assert norm.deferred(x, below=9)[1] == EPS
    assert norm.deferred(x, below=8)[1] is None


@torch.no_grad()
def test_a_norm_is_folded_once() -> None:
    norm, product = norm_and_product()
    norm.fold_into(product)
    weight = product.weight.clone()
    norm.fold_into(product)
    assert torch.equal(product.weight, weight)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float16, False)])
def test_a_bias_or_a_narrow_range_keeps_the_norm_apart(dtype: torch.dtype, bias: bool) -> None:
    norm, product = norm_and_product(dtype=dtype, bias=bias)
    before = norm.weight.clone(), product.weight.clone()
    norm.fold_into(product)
    assert torch.equal(norm.weight, before[0])
    assert torch.equal(product.weight, before[1])
    x = torch.randn(3, 24, dtype=dtype)
    assert norm.deferred(x)[1] is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_block_scales_before_it_activates(dtype: torch.dtype) -> None:
    norm, block = RMSNorm(16, EPS).to(dtype), GatedMLP(16, 12).to(dtype)
    norm.weight.normal_(1, 0.25)
    for parameter in block.parameters():
        parameter.normal_(0, 0.3)
    x = torch.randn(9, 16).to(dtype) * 3
    expected = block(norm(x), x.clone())
    norm.fold_into(block.gate_up_proj)
    given, eps = norm.deferred(x)
    assert eps == EPS
    found = block(given, x.clone(), eps)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE[dtype]


@torch.no_grad()
def test_folding_is_as_exact_as_the_norms_of_transformers() -> None:
    """In bfloat16, with a few large channels whose weights are small, as models have them."""
    torch.manual_seed(0)
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x = torch.randn(64, 512).bfloat16()
    x[:, :3] *= 200
    theirs = Qwen3RMSNorm(512, eps=1e-6).bfloat16()
    theirs.weight.copy_(torch.rand(512) * 2 + 0.05)
    theirs.weight[:3] *= 0.01
    norm, product = RMSNorm(512, 1e-6).bfloat16(), Linear(512, 256).bfloat16()
    norm.weight.copy_(theirs.weight)
    product.weight.normal_(0, 0.05)
    exact = F.rms_norm(x.double(), (512,), norm.weight.double(), 1e-6) @ product.weight.double().T
    apart = product(theirs(x))
    norm.fold_into(product)
    folded = (product(x).float() * row_factor(x, 1e-6)).bfloat16()

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    assert error(folded) < 1.1 * error(apart)


@torch.no_grad()
def test_a_model_says_which_norms_fold(tmp_path: object) -> None:
    folder = save_checkpoint(make_reference("Qwen3ForCausalLM", head_dim=8), tmp_path)  # type: ignore[arg-type]
    model = load_model(folder)
    prompts = [[5, 9, 2], [7]]
    expected = run_prompts(model, prompts)
    fold_norms(model)
    for layer in model.get_layer_stack().layers:
        assert torch.equal(layer.input_layernorm.weight, torch.ones(32))
        assert torch.equal(layer.post_attention_layernorm.weight, torch.ones(32))
        assert not layer.self_attn.q_norm.folded
    assert not model.get_layer_stack().norm.folded
    for found, wanted in zip(run_prompts(model, prompts), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "size", "hidden"), [(1, 8, 5), (33, 77, 128), (7, 3000, 4096)])
def test_the_activation_multiplies_with_the_factor_of_its_rows(
    rows: int, size: int, hidden: int, dtype: torch.dtype, device: str
) -> None:
    wide = torch.randn(rows, 2 * size, device=device).to(dtype)
    x = torch.randn(rows, hidden + 3, device=device).to(dtype)[:, :hidden] * 4
    found = silu_mul(wide, normed=x, eps=EPS)
    scaled = wide.double() * row_factor(x, EPS).double()
    gate, up = scaled.chunk(2, dim=1)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        found, silu_mul_reference(wide, None, x, EPS), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_norm", [True, False])
@pytest.mark.parametrize(("rows", "hidden", "rotated"), [(1, 24, 16), (19, 1000, 8)])
def test_heads_are_multiplied_with_the_factor_of_their_rows(
    rows: int, hidden: int, rotated: int, head_norm: bool, dtype: torch.dtype, device: str
) -> None:
    heads, kv_heads, head_dim = 6, 2, 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    qkv, x = normal(rows, (heads + 2 * kv_heads) * head_dim), normal(rows, hidden) * 4
    weights = {"q_weight": normal(head_dim), "k_weight": normal(head_dim)} if head_norm else {}

    def run(qkv: torch.Tensor, **normed: object) -> list[torch.Tensor]:
        caches = [torch.zeros(rows + 3, kv_heads, head_dim, device=device).to(dtype) for _ in "kv"]
        out = qkv_norm_rope_store(
            qkv,
            cos_sin=cos_sin,
            out_cache_loc=slots,
            k_cache=caches[0],
            v_cache=caches[1],
            eps=EPS,
            **weights,
            **normed,
        )
        return [*out, *caches]

    cos_sin, slots = normal(rows, 2, rotated // 2), torch.randperm(rows + 3, device=device)[:rows]
    expected = run((qkv.float() * row_factor(x, EPS)).to(dtype))
    found = run(qkv.clone(), normed=x, normed_eps=EPS)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_factor_of_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="normed has 3 rows and gate 2"):
        silu_mul(torch.zeros(2, 4), normed=torch.zeros(3, 4))
    cache = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="normed has 3 rows and qkv 2"):
        qkv_norm_rope_store(
            torch.zeros(2, 24),
            cos_sin=torch.zeros(2, 2, 4),
            out_cache_loc=torch.zeros(2, dtype=torch.int64),
            k_cache=cache,
            v_cache=cache,
            normed=torch.zeros(3, 4),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "silu_mul", "relu_squared"])
def test_a_small_product_multiplies_with_the_factor_of_its_rows(
    activation: str, device: str
) -> None:
    """With the depth whole and divided among programs."""
    for rows, size, features in ((1, 128, 64), (17, 1408, 130), (32, 4096, 512)):
        x = torch.randn(rows, size, device=device).bfloat16() * 4
        weight = (torch.randn(features, size, device=device) * size**-0.5).bfloat16()
        found = small_product(x, weight, activation, EPS)  # type: ignore[arg-type]
        normed = rms_norm(x, torch.ones(size, device=device).bfloat16(), EPS)
        expected = small_product(normed, weight, activation)  # type: ignore[arg-type]
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < TOLERANCE[torch.bfloat16]
        assert torch.equal(found, small_product(x, weight, activation, EPS))  # type: ignore[arg-type]
