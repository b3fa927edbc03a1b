"""The norm ops equal torch's and transformers' norms, alone, after an addition and gated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture
from breakgraph.kernels.layer_norm import layer_norm, layer_norm_reference
from breakgraph.kernels.norms import (
    add_rms_norm,
    add_rms_norm_reference,
    gated_rms_norm,
    gated_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
EPS = 1e-5


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def rows_of(
    rows: int, size: int, dtype: torch.dtype = torch.float32, device: str = "cpu", gap: int = 3
) -> torch.Tensor:
    """Rows that are a view of wider ones."""
    return torch.randn(rows, size + gap, device=device).to(dtype)[:, :size]


@given(rows=st.integers(1, 4), size=st.integers(1, 50))
@settings(max_examples=20)
def test_rms_norm_equals_torch(rows: int, size: int) -> None:
    x, weight = rows_of(rows, size), torch.randn(size)
    assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (size,), weight, EPS))
    assert_close(rms_norm(x, weight, EPS, 1.0), F.rms_norm(x, (size,), weight + 1, EPS))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_weights_around_zero_equals_transformers(weight_dtype: torch.dtype) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    norm = Qwen3NextRMSNorm(40, eps=EPS)
    norm.weight.data = torch.randn(40).to(weight_dtype)
    x = rows_of(6, 40, torch.bfloat16)
    assert torch.equal(rms_norm(x, norm.weight.detach(), EPS, 1.0), norm(x).detach())


def test_add_rms_norm_adds_in_place_and_normalises_the_rounded_sum() -> None:
    residual, x = (rows_of(5, 24, torch.bfloat16) for _ in range(2))
    weight, total = torch.randn(24).to(torch.bfloat16), residual + x
    assert_close(add_rms_norm(residual, x, weight, EPS), rms_norm(total, weight, EPS))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_first_equals_transformers(dtype: torch.dtype) -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

    norm = NemotronHRMSNormGated(48, group_size=16, eps=EPS)
    norm.weight.data = torch.randn(48).to(dtype)
    x, gate = (rows_of(7, 48, dtype) for _ in range(2))
    found = gated_rms_norm(x, gate, norm.weight.detach(), EPS, 16, True)
    assert torch.equal(found, norm(x.contiguous(), gate).detach())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_gate_last_equals_transformers(weight_dtype: torch.dtype) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    norm = Qwen3NextRMSNormGated(12, eps=EPS)
    norm.weight.data = torch.randn(12).to(weight_dtype)
    x, gate = (rows_of(7, 36, torch.bfloat16) for _ in range(2))
    expected = norm(x.reshape(-1, 12), gate.reshape(-1, 12)).detach().view(7, 36)
    assert torch.equal(gated_rms_norm(x, gate, norm.weight.detach(), EPS, 12, False), expected)
    repeated = norm.weight.detach().repeat(3)
    assert torch.equal(gated_rms_norm(x, gate, repeated, EPS, 12, False), expected)


@given(rows=st.integers(1, 4), size=st.integers(1, 50))
@settings(max_examples=20)
def test_layer_norm_equals_torch(rows: int, size: int) -> None:
    x, residual = (rows_of(rows, size) for _ in range(2))
    weight, bias = torch.randn(2, size)
    assert_close(layer_norm(x, weight, bias, EPS), F.layer_norm(x, (size,), weight, bias, EPS))
    expected = F.layer_norm(x + residual, (size,), weight, None, EPS)
    assert_close(layer_norm(x, weight, None, EPS, residual), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_rounds_the_sum_and_the_result_as_torch_does(dtype: torch.dtype) -> None:
    x, residual = (rows_of(6, 40, dtype) for _ in range(2))
    before, (weight, bias) = x.clone(), torch.randn(2, 40).to(dtype)
    expected = F.layer_norm(x + residual, (40,), weight, bias, 1e-12)
    for scale, shift in ((weight, bias), (weight.float(), bias.float())):
        normed = layer_norm(x, scale, shift, 1e-12, residual)
        # The order of a sum may turn a rounding here and there; another rounding turns a third.
        assert (normed != expected).float().mean() < 0.04
        torch.testing.assert_close(normed, expected)
    assert torch.equal(x, before)


def test_a_captured_call_reads_its_inputs_at_replay() -> None:
    x, gate, residual = (rows_of(4, 12) for _ in range(3))
    weight, graph = torch.randn(12), BreakableCUDAGraph()
    with BreakableCUDAGraphCapture(graph, device="cpu"):
        normed = rms_norm(x, weight, EPS)
        added = add_rms_norm(residual, x, weight, EPS)
        gated = gated_rms_norm(x, gate, weight, EPS, 4, True)
        centred = layer_norm(x, weight, None, EPS, gate)
    for tensor in (x, gate, residual):
        tensor.normal_()
    before = residual.clone()
    graph.pool().poison()
    graph.replay()
    assert_close(normed, rms_norm_reference(x, weight, EPS, 0.0))
    assert_close(gated, gated_rms_norm_reference(x, gate, weight, EPS, 4, True))
    assert_close(centred, layer_norm_reference(x, gate, weight, None, EPS))
    torch.testing.assert_close(residual, before + x)
    assert_close(added, rms_norm_reference(residual, weight, EPS, 0.0))


def test_rows_of_zeros_stay_finite() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    for found in (
        rms_norm(x, weight, EPS),
        add_rms_norm(x, x.clone(), weight, EPS),
        gated_rms_norm(x, x, weight, EPS, 4, True),
        gated_rms_norm(x, x, weight, EPS, 4, False),
        layer_norm(x, weight, None, EPS, x),
    ):
        assert torch.equal(found, x)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight has shape \[7\]; \[8\], contiguous"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"\[8\] or \[4\]"):
        gated_rms_norm(x, x, torch.ones(2), EPS, 4, True)
    with pytest.raises(ValueError, match="groups of 3 do not fill a row of 8"):
        gated_rms_norm(x, x, weight, EPS, 3, True)
    with pytest.raises(ValueError, match=r"x is torch\.float16 and residual torch\.float32"):
        add_rms_norm(x, x.half(), weight, EPS)
    with pytest.raises(ValueError, match=r"x is torch\.float16 and residual torch\.float32"):
        layer_norm(x.half(), weight, None, EPS, x)
    with pytest.raises(ValueError, match=r"bias has shape \[7\]; \[8\], contiguous"):
        layer_norm(x, weight, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"x \[3, 8\], residual \[1, 8\]"):
        layer_norm(x, weight, None, EPS, x[:1])
    with pytest.raises(ValueError, match=r"call \.contiguous\(\) first"):
        rms_norm(torch.zeros(8, 3).T, weight, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 77, 4096, 5000])
def test_norm_kernels_equal_references(dtype: torch.dtype, size: int) -> None:
    for rows, weight_dtype, offset in ((1, dtype, 0.0), (130, torch.float32, 1.0)):
        x, residual = (rows_of(rows, size, dtype, "cuda") for _ in range(2))
        weight = torch.randn(size, device="cuda").to(weight_dtype)
        expected = rms_norm_reference(x, weight, EPS, offset)
        assert_close(rms_norm(x, weight, EPS, offset), expected)
        total = residual.clone()
        expected = add_rms_norm_reference(total, x, weight, EPS, offset)
        assert_close(add_rms_norm(residual, x, weight, EPS, offset), expected)
        assert torch.equal(residual, total)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 77, 768, 1024, 5000])
def test_layer_norm_kernel_equals_torch(dtype: torch.dtype, size: int) -> None:
    for rows, eps in ((1, EPS), (130, 1e-12)):
        x, residual = (rows_of(rows, size, dtype, "cuda").add_(3) for _ in range(2))
        weight, bias = torch.randn(2, size, device="cuda").to(dtype)
        for added, shift in ((None, bias), (residual, bias), (residual, None)):
            total = x if added is None else x + added
            expected = F.layer_norm(total, (size,), weight, shift, eps)
            assert_close(layer_norm(x, weight, shift, eps, added), expected)
        wide = layer_norm_reference(x, residual, weight.float(), bias.float(), eps)
        assert_close(layer_norm(x, weight.float(), bias.float(), eps, residual), wide)


@pytest.mark.gpu
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "group_size"), [(8192, 1024), (4096, 128), (231, 77), (15, 5)])
def test_gated_kernel_equals_reference(
    dtype: torch.dtype, size: int, group_size: int, gate_first: bool
) -> None:
    for rows, weight_dtype, length in ((1, dtype, size), (66, torch.float32, group_size)):
        x, gate = (rows_of(rows, size, dtype, "cuda", gap) for gap in (0, 64))
        weight = torch.randn(length, device="cuda").to(weight_dtype)
        expected = gated_rms_norm_reference(x, gate, weight, EPS, group_size, gate_first)
        found = gated_rms_norm(x, gate, weight, EPS, group_size, gate_first)
        assert_close(found, expected)


@pytest.mark.gpu
def test_cuda_graph_of_another_row_count_than_the_warm_up() -> None:
    weight = torch.randn(256, device="cuda")

    def run(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            rms_norm(x, weight, EPS),
            add_rms_norm(residual, x, weight, EPS),
            gated_rms_norm(x, residual, weight, EPS, 64, True),
            layer_norm(x, weight, weight, EPS, residual),
        )

    run(*(rows_of(1, 256, device="cuda", gap=0) for _ in range(2)))
    x, residual = (rows_of(48, 256, device="cuda", gap=0) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x, residual)
    x.normal_()
    before = residual.clone()
    graph.replay()
    expected = run(x, before)
    for result, wanted in zip(found, expected, strict=True):
        assert_close(result, wanted)
