"""Packed batches over a random cache, and what attention of them should be."""

from __future__ import annotations

import prefill_support
import pytest
import torch

from breakgraph.attention import Attention, AttentionBackend, TorchNativeBackend
from breakgraph.forward import ForwardBatch, LayerInputs, forward_context
from breakgraph.graph import BreakableCUDAGraph, BreakableCUDAGraphCapture, CaptureAudit

SLOTS = 4096
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCHES = {
    "one short": [(5, 0)],
    "one long": [(700, 0)],
    "many, no prefix": [(1, 0), (40, 0), (300, 0), (128, 0), (17, 0)],
    "prefixes": [(9, 0), (130, 77), (1, 500), (64, 3), (1, 0), (200, 600)],
    "one token each": [(1, n) for n in (0, 1, 95, 96, 97, 400)],
}
Lengths = list[tuple[int, int]]


def make_batch(lengths: Lengths, seed: int = 0) -> ForwardBatch:
    """Requests of ``(new, prefix)`` tokens on random slots of ``make_layer``'s caches."""
    return prefill_support.make_batch(lengths, seed, num_slots=SLOTS - 1)


def make_layer(
    device: str, dtype: torch.dtype, heads: int = 8, kv_heads: int = 2, head_dim: int = 64
) -> Attention:
    layer = Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    generator = torch.Generator(device).manual_seed(1)
    shape = (SLOTS, kv_heads, head_dim)
    layer.k_cache, layer.v_cache = (
        torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(2)
    )
    return layer


def make_inputs(
    layer: Attention, batch: ForwardBatch, padding: int = 0
) -> tuple[torch.Tensor, ...]:
    """q, k and v as the parts of one projection, k and v stored; padded rows are noise."""
    device, dtype = layer.k_cache.device, layer.k_cache.dtype
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    generator = torch.Generator(device).manual_seed(2)
    rows = batch.num_tokens + padding
    whole = torch.randn(
        (rows, sum(heads), layer.head_dim), device=device, dtype=dtype, generator=generator
    )
    q, k, v = whole.split(heads, dim=1)
    store(layer, batch, k, v)
    return q, k, v


def store(layer: Attention, batch: ForwardBatch, k: torch.Tensor, v: torch.Tensor) -> None:
    slots = torch.from_numpy(batch.out_cache_loc).to(k.device)
    layer.k_cache[slots], layer.v_cache[slots] = k[: len(slots)], v[: len(slots)]


def reference(layer: Attention, batch: ForwardBatch, *qkv: torch.Tensor) -> torch.Tensor:
    """By ``scaled_dot_product_attention``, in float32."""
    wide = Attention(
        num_heads=layer.num_heads, num_kv_heads=layer.num_kv_heads, head_dim=layer.head_dim
    )
    wide.scale = layer.scale
    wide.k_cache, wide.v_cache = layer.k_cache.float(), layer.v_cache.float()
    backend, out = TorchNativeBackend(qkv[0].device), torch.zeros_like(qkv[0]).float()
    backend.init_forward_metadata(batch)
    backend.forward(wide, *(tensor.float() for tensor in qkv), out)
    return out[: batch.num_tokens]


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[got.dtype]
    torch.testing.assert_close(got.float(), wanted, rtol=bound, atol=bound)


def check_one_capture_serves_all(
    layer: Attention, backend: AttentionBackend, bucket: int, *, in_place: bool = False
) -> None:
    """Capture a call of ``bucket`` rows, and replay it for all ``BATCHES``."""
    device, dtype = layer.k_cache.device, layer.k_cache.dtype
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    static = torch.zeros(bucket, sum(heads), layer.head_dim, device=device, dtype=dtype)
    q, k, v = static.split(heads, dim=1)
    audit = CaptureAudit([static, layer.k_cache, layer.v_cache, *backend.tensors()])
    dummy, graph = ForwardBatch.dummy(bucket, 200), BreakableCUDAGraph()
    for _ in range(2 if device.type == "cuda" else 1):  # the first call loads the kernels
        backend.init_forward_metadata(dummy, bucket)
        with forward_context(dummy, backend):
            warm = layer.attend(q, k, v)
    with (
        forward_context(dummy, backend),
        BreakableCUDAGraphCapture(graph, device=device, audit=audit),
    ):
        positions = torch.zeros(bucket, dtype=torch.int64, device=device)
        backend.begin_layers(LayerInputs(static, positions, positions, positions))
        own = q.clone() if in_place else q
        out = layer.attend(own, k, v, out=own if in_place else None)
    assert graph.num_segments == 1 and graph.num_breaks == 0
    assert warm.isfinite().all()
    for lengths in BATCHES.values():
        batch = make_batch(lengths)
        if batch.num_tokens > bucket:
            continue
        for target, source in zip((q, k, v), make_inputs(layer, batch), strict=True):
            target.fill_(3.0)
            target[: batch.num_tokens] = source
        out.fill_(float("nan"))
        backend.init_forward_metadata(batch, bucket)
        graph.replay()
        rows = slice(batch.num_tokens)
        assert_close(out[rows], reference(layer, batch, q[rows], k[rows], v[rows]))
        assert out.isfinite().all(), "padded rows must be finite"
