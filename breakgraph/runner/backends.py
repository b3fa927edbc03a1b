"""Which backends plan a model's mixers, for its device, dtype and flags."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from breakgraph.attention import (
    Attention,
    AttentionBackend,
    ByRowsBackend,
    FlashInferBackend,
    FlashLatentPrefillBackend,
    HybridAttentionBackend,
    LatentAttention,
    LatentDecodeBackend,
    LatentPrefillBackend,
    LinearDecodeBackend,
    LinearPrefillBackend,
    PagedDecodeBackend,
    RadixLinearAttention,
    SlotMirror,
    TiledBackend,
    TorchFlashBackend,
    TorchNativeBackend,
    beyond_causal,
    see_everything,
)
from breakgraph.attention.flashinfer import unserved
from breakgraph.attention.tiled import SHORT
from breakgraph.kernels.tiled_attention import rows_of_wave

if TYPE_CHECKING:
    from breakgraph.memory import MambaPool
    from breakgraph.models import PrefillModel
    from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)


def prefill_backend(
    model: PrefillModel,
    args: ServerArgs,
    dtype: torch.dtype,
    device: torch.device,
    chunk_size: int,
    mamba_pool: MambaPool | None,
) -> AttentionBackend:
    """For packed sequences, attention and recurrent mixers run in breaks."""
    most = args.max_running_requests
    full = _attention_backend(model, args, dtype, device, chunk_size, most)
    full = _few_rows_tiled(full, model, args, dtype, device, chunk_size, most)
    if mamba_pool is None:
        return full
    linear = linear_backend(model, mamba_pool, device, most, chunk_size)
    return HybridAttentionBackend(full, linear)


def static_prefill_backend(
    model: PrefillModel,
    args: ServerArgs,
    dtype: torch.dtype,
    device: torch.device,
    chunk_size: int,
    mamba_pool: MambaPool | None,
) -> AttentionBackend | None:
    """For up to ``args.graph_slots`` packed sequences, all of it captured.

    None where the model's attention has no plan that graphs could hold.
    """
    if any(isinstance(module, LatentAttention) for module in model.modules()):
        return None
    slots = args.graph_slots
    full = _attention_backend(model, args, dtype, device, chunk_size, slots, static=True)
    asked = args.attention_backend == "torch_native"
    if isinstance(full, TorchNativeBackend) and device.type == "cuda" and not asked:
        return None  # its scores of all rows with all would take gigabytes of a long bucket
    full = _few_rows_tiled(full, model, args, dtype, device, chunk_size, slots)
    if mamba_pool is None:
        return full
    linear = linear_backend(model, mamba_pool, device, slots, chunk_size, static=True)
    return HybridAttentionBackend(full, linear)


def _few_rows_tiled(
    many: AttentionBackend,
    model: PrefillModel,
    args: ServerArgs,
    dtype: torch.dtype,
    device: torch.device,
    chunk_size: int,
    max_requests: int,
) -> AttentionBackend:
    """``many``, with forwards of few rows left to the tiled kernel where that serves the model."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    first, asked = layers[0], args.attention_backend != "auto"
    if asked or device.type != "cuda" or dtype.itemsize != 2 or first.head_dim > 256:
        return many
    if beyond_causal(layers) is not None and not see_everything(layers):
        return many
    short = SHORT if isinstance(many, TorchFlashBackend) else 0
    few = TiledBackend(
        first,
        device=device,
        max_requests=max_requests,
        max_context_tokens=max_requests * model.context_length if many.capturable else chunk_size,
        max_new_tokens=chunk_size,
        static=many.capturable,
    )
    wave = rows_of_wave(first.num_heads, first.num_kv_heads, device)
    return ByRowsBackend(few, many, wave, short)


def linear_backend(
    model: PrefillModel,
    mamba_pool: MambaPool,
    device: torch.device,
    max_requests: int,
    max_tokens: int,
    *,
    static: bool = False,
) -> LinearPrefillBackend:
    """For the recurrent mixers alone; ``static`` where they are to be captured."""
    mixer = next(module for module in model.modules() if isinstance(module, RadixLinearAttention))
    if device.type == "cuda":
        mixer.require_kernels()
    return LinearPrefillBackend(
        device=device,
        max_requests=max_requests,
        max_tokens=max_tokens,
        chunk_size=mixer.chunk_size,
        reserved_slot=mamba_pool.reserved_slot,
        static=static,
    )


def paged_decode_backend(model: PrefillModel, mirror: SlotMirror) -> PagedDecodeBackend:
    """For the attention layers of a decode."""
    latent = any(isinstance(module, LatentAttention) for module in model.modules())
    return LatentDecodeBackend(mirror) if latent else PagedDecodeBackend(mirror)


def decode_backend(
    paged: PagedDecodeBackend | None, mamba_pool: MambaPool | None
) -> AttentionBackend | None:
    """For one token a request, all of it capturable."""
    if paged is None or mamba_pool is None:
        return paged
    return HybridAttentionBackend(paged, LinearDecodeBackend())


def _attention_backend(
    model: PrefillModel,
    args: ServerArgs,
    dtype: torch.dtype,
    device: torch.device,
    chunk_size: int,
    max_requests: int,
    *,
    static: bool = False,
) -> AttentionBackend:
    name = args.attention_backend
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    first = layers[0]
    latent = first.shape if isinstance(first, LatentAttention) else None
    head_dim = latent.qk_dim if latent is not None else first.head_dim
    if name in ("auto", "flashinfer"):
        tokens = max_requests * model.context_length if static else chunk_size
        flashinfer = flashinfer_backend(
            *(layers, dtype, device, max_requests, tokens),
            asked=name == "flashinfer",
            max_new_tokens=chunk_size,
            static=static,
        )
        if flashinfer is not None:
            return flashinfer
    half = dtype in (torch.bfloat16, torch.float16)
    flash = device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256
    flash = flash and (latent is None or latent.value_dim <= head_dim)
    if name == "torch_flash" and not flash:
        raise ValueError(
            f"--attention-backend torch_flash cannot serve {dtype} heads of {head_dim} on "
            f"{device}; use --attention-backend torch_native"
        )
    native = name == "torch_native" or not flash
    if latent is not None:
        backend_class = LatentPrefillBackend if native else FlashLatentPrefillBackend
        return backend_class(
            *(latent, dtype, device),
            max_requests=max_requests,
            max_context_tokens=chunk_size,
        )
    if native:
        return TorchNativeBackend(device, max_requests=max_requests, static=static)
    return TorchFlashBackend(
        device=device, max_requests=max_requests, max_context_tokens=chunk_size, static=static
    )


def flashinfer_backend(
    layers: Sequence[Attention],
    dtype: torch.dtype,
    device: torch.device,
    max_requests: int,
    max_context_tokens: int,
    *,
    asked: bool,
    max_new_tokens: int | None = None,
    static: bool = False,
) -> FlashInferBackend | None:
    """For a model's attention ``layers``, or None; ``static`` where it is to be captured.

    Raises:
        ValueError: it was ``asked`` for and cannot serve them.
    """
    # Where it serves a model it is the faster one (python -m benchmarks.bench_attention). On an
    # H200 in bfloat16, 32 heads of 128 over 8, FlashAttention-2 takes 6.9, 11, 25, 61, 517 and
    # 1757 µs for one request of 16, 128, 512, 1024, 4096 and 8192 tokens, and this takes 6.1,
    # 6.6, 11, 21, 210 and 800; for 16 tokens behind 8000 cached ones 262 and 114. A break keeps
    # the host for 28 µs, 51 where a prefix is gathered, and here for 8. Plans take about 35 both.
    # Only a decode that runs as a prefill, 64 requests of one token behind 1024, is as slow (266
    # and 285).
    latent = any(isinstance(layer, LatentAttention) for layer in layers)
    why = "it has no latent attention" if latent else unserved(layers, dtype, device)
    if why is None:
        try:
            return FlashInferBackend(
                *(layers[0], dtype),
                device=device,
                max_requests=max_requests,
                max_context_tokens=max_context_tokens,
                max_new_tokens=max_new_tokens,
                static=static,
            )
        except RuntimeError as error:
            why = str(error)
            if not asked:
                logger.warning("%s. FlashAttention-2 takes their place", why)
    if asked:
        raise ValueError(f"--attention-backend flashinfer: {why}; or use --attention-backend auto")
    return None
