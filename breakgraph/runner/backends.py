"""Which backends plan a model's mixers, for its device, dtype and flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from breakgraph.attention import (
    Attention,
    AttentionBackend,
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
    TorchFlashBackend,
    TorchNativeBackend,
)

if TYPE_CHECKING:
    from breakgraph.memory import MambaPool
    from breakgraph.models import PrefillModel
    from breakgraph.server_args import ServerArgs


def prefill_backend(
    model: PrefillModel,
    args: ServerArgs,
    dtype: torch.dtype,
    device: torch.device,
    chunk_size: int,
    mamba_pool: MambaPool | None,
) -> AttentionBackend:
    """For packed sequences, attention and recurrent mixers run in breaks."""
    full = _attention_backend(model, args, dtype, device, chunk_size)
    if mamba_pool is None:
        return full
    linear = linear_backend(model, mamba_pool, device, args.max_running_requests, chunk_size)
    return HybridAttentionBackend(full, linear)


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
) -> AttentionBackend:
    name = args.attention_backend
    first = next(m for m in model.modules() if isinstance(m, Attention))
    latent = first.shape if isinstance(first, LatentAttention) else None
    head_dim = latent.qk_dim if latent is not None else first.head_dim
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
            max_requests=args.max_running_requests,
            max_context_tokens=chunk_size,
        )
    if native:
        return TorchNativeBackend(device)
    return TorchFlashBackend(
        device=device, max_requests=args.max_running_requests, max_context_tokens=chunk_size
    )
