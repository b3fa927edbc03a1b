"""The fused activations and the head kernel equal the torch ops whose place they take."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture
from breakgraph.kernels.launch import import_triton
from breakgraph.kernels.pointwise import relu_squared_, silu_mul, silu_mul_reference
from breakgraph.kernels.rotary import (
    qk_norm_rope_store,
    qk_norm_rope_store_reference,
    qkv_norm_rope_store,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def halves(rows: int, size: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    wide = torch.randn(rows, 2 * size + 3, device=device).mul_(3).to(dtype)
    return wide[:, :size], wide[:, size : 2 * size]


class Heads:
    """A fused projection of heads, and all that the head kernel needs beside it."""

    def __init__(
        self,
        rows: int = 5,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 8,
        rotated: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        offset: float = 0.0,
        gap: int = 0,
    ) -> None:
        def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        rotated = head_dim if rotated is None else rotated
        self.qkv = normal(rows, heads + 2 * kv_heads, head_dim + gap)
        self.split = [heads, kv_heads, kv_heads]
        self.head_dim = head_dim
        self.cos_sin = normal(rows, 2, rotated // 2)
        self.slots = torch.randperm(rows + 7, device=device)[:rows]
        self.k_cache, self.v_cache = (normal(rows + 7, kv_heads, head_dim) for _ in range(2))
        self.q_weight, self.k_weight = (normal(head_dim) for _ in range(2))
        self.offset = offset

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        qkv = self.qkv[..., : self.head_dim].split(self.split, dim=1)
        return (*qkv, self.cos_sin, self.slots)

    def run(self, *, norm: bool = True) -> tuple[torch.Tensor, ...]:
        """The op; returns query, key and both caches."""
        q, k, v, cos_sin, slots = self.inputs
        weights = {"q_weight": self.q_weight, "k_weight": self.k_weight} if norm else {}
        q_out, k_out = qk_norm_rope_store(
            *(q, k, v),
            cos_sin=cos_sin,
            out_cache_loc=slots,
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            eps=1e-6,
            offset=self.offset,
            **weights,
        )
        return q_out, k_out, self.k_cache, self.v_cache

    def expected(self, *, norm: bool = True) -> tuple[torch.Tensor, ...]:
        q, k, v, cos_sin, slots = self.inputs
        weights = (self.q_weight, self.k_weight) if norm else (None, None)
        caches = self.k_cache.clone(), self.v_cache.clone()
        result = qk_norm_rope_store_reference(
            q, k, v, *weights, 1e-6, self.offset, cos_sin, slots, *caches
        )
        return (*result, *caches)


@given(rows=st.integers(1, 4), size=st.integers(1, 40))
@settings(max_examples=20)
def test_activations_equal_the_formulas(rows: int, size: int) -> None:
    gate, up = halves(rows, size, torch.float32, "cpu")
    assert_close(silu_mul(gate, up), gate * torch.sigmoid(gate) * up)
    expected = gate.clamp(min=0) ** 2
    changed = relu_squared_(gate)
    assert changed.data_ptr() == gate.data_ptr()
    assert_close(changed, expected)


def test_silu_is_rounded_before_the_product() -> None:
    gate, up = halves(3, 50, torch.bfloat16, "cpu")
    assert torch.equal(silu_mul(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_equal_transformers(norm: bool, dtype: torch.dtype) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    heads = Heads(dtype=dtype)
    q, k, v, cos_sin, slots = heads.inputs
    if norm:
        layer = Qwen3RMSNorm(8, eps=1e-6)
        layer.weight.data = heads.q_weight
        q = layer(q).detach()
        layer.weight.data = heads.k_weight
        k = layer(k).detach()
    cos, sin = (torch.cat([part, part], dim=-1) for part in cos_sin.unbind(1))
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    found_q, found_k, k_cache, v_cache = heads.run(norm=norm)
    for found, expected in ((found_q, expected_q), (found_k, expected_k)):
        assert found.is_contiguous()
        assert_close(found, expected)
    assert torch.equal(k_cache[slots], found_k)
    assert torch.equal(v_cache[slots], v)


def test_heads_equal_transformers_where_a_part_is_rotated_and_weights_lie_around_zero() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        Qwen3NextRMSNorm,
        apply_rotary_pos_emb,
    )

    heads = Heads(head_dim=16, rotated=4, offset=1.0, dtype=torch.bfloat16, gap=3)
    q, k, _, cos_sin, _ = heads.inputs
    normed = []
    for x, weight in ((q, heads.q_weight), (k, heads.k_weight)):
        norm = Qwen3NextRMSNorm(16, eps=1e-6)
        norm.weight.data = weight
        normed.append(norm(x).detach())
    cos, sin = (torch.cat([part, part], dim=-1) for part in cos_sin.unbind(1))
    expected = apply_rotary_pos_emb(*normed, cos, sin)
    for found, wanted in zip(heads.run()[:2], expected, strict=True):
        assert_close(found, wanted)


def test_only_the_slots_of_the_rows_are_stored() -> None:
    heads = Heads()
    before = heads.k_cache.clone(), heads.v_cache.clone()
    others = torch.ones(len(heads.k_cache), dtype=torch.bool)
    others[heads.slots] = False
    heads.run()
    for old, new in zip(before, (heads.k_cache, heads.v_cache), strict=True):
        assert torch.equal(old[others], new[others])


def test_rows_of_zeros_stay_finite() -> None:
    heads = Heads()
    heads.qkv[2:] = 0
    heads.slots[2:] = 0
    assert all(x.isfinite().all() for x in heads.run())
    assert silu_mul(torch.zeros(2, 3), torch.zeros(2, 3)).isfinite().all()


def test_a_captured_call_reads_its_inputs_at_replay() -> None:
    heads = Heads()
    gate, up = halves(3, 7, torch.float32, "cpu")
    graph = BreakableCUDAGraph()
    caches = heads.k_cache.clone(), heads.v_cache.clone()
    with torch.no_grad(), BreakableCUDAGraphCapture(graph, device="cpu"):
        out = torch.stack([*heads.run()[:1]]), silu_mul(gate, up), relu_squared_(up + gate)
    kept = [torch.empty_like(x) for x in out]
    for tensor in (heads.qkv, heads.cos_sin, gate, up):
        tensor.normal_()
    heads.slots.copy_(heads.slots.roll(1))
    for cache, old in zip((heads.k_cache, heads.v_cache), caches, strict=True):
        cache.copy_(old)
    expected = heads.expected()
    graph.pool().poison()
    graph.replay()
    for tensor, result in zip(kept, out, strict=True):
        tensor.copy_(result)
    assert_close(kept[0][0], expected[0])
    assert_close(kept[1], silu_mul_reference(gate, up))
    assert_close(kept[2], torch.relu(up + gate) ** 2)
    assert_close(heads.k_cache, expected[2])
    assert_close(heads.v_cache, expected[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 2, 7)}, "must have the rows and the head size"),
        ({"q": torch.zeros(5, 8, 4).transpose(1, 2)}, "must be dense"),
        ({"cos_sin": torch.zeros(5, 2, 5)}, "two halves inside of a head of 8"),
        ({"k_cache": torch.zeros(9, 3, 8)}, "must hold heads"),
        ({"v_cache": torch.zeros(9, 8, 2).transpose(1, 2)}, "must be contiguous"),
        ({"q_weight": None}, "one was given and one was not"),
        ({"q_weight": torch.zeros(8, dtype=torch.float16)}, "of one dtype"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    heads = Heads()
    q, k, v, cos_sin, slots = heads.inputs
    given = {"q": q, "k": k, "v": v, "cos_sin": cos_sin, "out_cache_loc": slots}
    given |= {"k_cache": heads.k_cache, "v_cache": heads.v_cache}
    given |= {"q_weight": heads.q_weight, "k_weight": heads.k_weight}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_store(**given | change)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_projection_gives_the_bits_of_its_heads(dtype: torch.dtype, device: str) -> None:
    heads = Heads(dtype=dtype, device=device)
    expected = [x.clone() for x in heads.run()]
    heads.k_cache.zero_()
    heads.v_cache.zero_()
    projection = heads.qkv.flatten(1)
    q, k, v = qkv_norm_rope_store(
        projection,
        cos_sin=heads.cos_sin,
        out_cache_loc=heads.slots,
        k_cache=heads.k_cache,
        v_cache=heads.v_cache,
        q_weight=heads.q_weight,
        k_weight=heads.k_weight,
        eps=1e-6,
    )
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(v, heads.inputs[2])
    assert v.untyped_storage().data_ptr() == projection.untyped_storage().data_ptr()
    for cache, wanted in zip((heads.k_cache, heads.v_cache), expected[2:], strict=True):
        assert torch.equal(cache[heads.slots], wanted[heads.slots])


@pytest.mark.parametrize("shape", [(5, 4, 8), (5, 63), (5, 32)])
def test_a_projection_without_heads_is_refused(shape: tuple[int, ...]) -> None:
    heads = Heads()
    others = {"cos_sin": heads.cos_sin, "out_cache_loc": heads.slots}
    with pytest.raises(ValueError, match="queries, and 2 of keys and of values each"):
        qkv_norm_rope_store(
            torch.zeros(shape), k_cache=heads.k_cache, v_cache=heads.v_cache, **others
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_wide_product_is_a_gate_and_what_it_gates(device: str) -> None:
    wide = torch.randn(3, 16, device=device)
    assert torch.equal(silu_mul(wide), silu_mul(*wide.chunk(2, dim=1)))
    with pytest.raises(ValueError, match="no two halves"):
        silu_mul(torch.zeros(2, 3, device=device))


def test_activations_refuse_gaps_and_unequal_shapes() -> None:
    with pytest.raises(ValueError, match=r"call \.contiguous\(\) first"):
        relu_squared_(torch.zeros(4, 3).T)
    with pytest.raises(ValueError, match=r"gate \[2, 3\], up \[2, 4\]"):
        silu_mul(torch.zeros(2, 3), torch.zeros(2, 4))


def test_without_triton_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton, or run on the CPU"):
        import_triton()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 77, 3072, 5001])
def test_activation_kernels_equal_torch(dtype: torch.dtype, size: int) -> None:
    for rows in (1, 3, 130):
        gate, up = halves(rows, size, dtype, "cuda")
        gate[0, 0] = float("-inf")
        gate[0, -1] = float("nan")
        expected = F.silu(gate) * up
        torch.testing.assert_close(
            *(silu_mul(gate, up), expected),
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
            equal_nan=True,
        )
        squared = torch.relu(gate).square()
        beside = up.clone()
        torch.testing.assert_close(relu_squared_(gate), squared, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(up, beside)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotated", "offset", "gap"),
    [
        (32, 8, 128, 128, 0.0, 0),
        (16, 2, 256, 64, 1.0, 256),
        (7, 1, 80, 80, 0.0, 0),
        (3, 3, 50, 22, 1.0, 1),
        (128, 1, 16, 0, 0.0, 0),
    ],
)
def test_head_kernel_equals_reference(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
    offset: float,
    gap: int,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rotated": rotated}
    for rows in (1, 33):
        for norm in (True, False):
            made = Heads(rows, dtype=dtype, device="cuda", offset=offset, gap=gap, **shape)
            expected = made.expected(norm=norm)
            for found, wanted in zip(made.run(norm=norm), expected, strict=True):
                assert_close(found, wanted)


@pytest.mark.gpu
def test_cuda_graph_of_another_row_count_than_the_warm_up() -> None:
    warm, heads = Heads(2, device="cuda"), Heads(48, device="cuda")
    warm.run()
    graph = torch.cuda.CUDAGraph()
    expected = heads.expected()
    with torch.cuda.graph(graph):
        q, k, k_cache, v_cache = heads.run()
    graph.replay()
    for found, wanted in zip((q, k, k_cache, v_cache), expected, strict=True):
        assert_close(found, wanted)
    heads.qkv.normal_()
    expected = heads.expected()
    graph.replay()
    assert_close(q, expected[0])
    assert_close(k, expected[1])
