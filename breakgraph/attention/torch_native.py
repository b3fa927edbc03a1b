"""Attention by ``scaled_dot_product_attention``: any device, any dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.layer import Attention
from breakgraph.attention.packed_lengths import PackedLengths
from breakgraph.forward import ForwardBatch
from breakgraph.kernels.packed_attention import packed_attention


@dataclass(frozen=True, slots=True)
class _Request:
    start: int
    end: int
    prefix_slots: torch.Tensor | None
    mask: torch.Tensor | None


class TorchNativeBackend(AttentionBackend):
    """The reference backend, and the one for CPU.

    Args:
        device: of the model.
        max_requests: the most requests of a ``static`` forward.
        static: keep the plan at fixed addresses, so that graphs can hold it. It then serves no
            cached prefix, and all requests in one masked product.
    """

    def __init__(
        self, device: torch.device, *, max_requests: int = 1, static: bool = False
    ) -> None:
        self.capturable, self.serves_prefixes = static, not static
        self._lengths: PackedLengths | None = None
        if static:
            self.max_requests, self._lengths = max_requests, PackedLengths(max_requests, device)
        self._device = device
        self._requests: list[_Request] = []

    def tensors(self) -> list[torch.Tensor]:
        return [] if self._lengths is None else [self._lengths.cu_seqlens]

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        if self._lengths is not None:
            self._lengths.send(batch)
            return
        self._requests = []
        start = slot = 0
        for new, prefix in zip(batch.extend_lens.tolist(), batch.prefix_lens.tolist(), strict=True):
            slots = mask = None
            if prefix:
                slots = torch.from_numpy(batch.prefix_slots[slot : slot + prefix]).to(self._device)
                if new > 1:
                    mask = torch.ones(new, prefix + new, dtype=torch.bool, device=self._device)
                    mask = mask.tril(diagonal=prefix)
            self._requests.append(_Request(start, start + new, slots, mask))
            start, slot = start + new, slot + prefix

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if self._lengths is not None:
            reach = (layer.scale, layer.left, layer.right)
            packed_attention(q, k, v, self._lengths.cu_seqlens, *reach, out)
            return
        for request in self._requests:
            rows = slice(request.start, request.end)
            keys, values = k[rows], v[rows]
            if request.prefix_slots is not None:
                keys = torch.cat([layer.k_cache[request.prefix_slots], keys])
                values = torch.cat([layer.v_cache[request.prefix_slots], values])
            mixed = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1).unsqueeze(0),
                keys.transpose(0, 1).unsqueeze(0),
                values.transpose(0, 1).unsqueeze(0),
                attn_mask=request.mask,
                is_causal=request.prefix_slots is None,
                scale=layer.scale,
                enable_gqa=layer.num_heads != layer.num_kv_heads,
            )
            out[rows].copy_(mixed.squeeze(0).transpose(0, 1))
