"""Attention by the FlashAttention-2 that torch carries, called below its Python wrappers.

``varlen_attn`` costs 53 µs of host time a call on an H200, ``aten._flash_attention_forward``
with its output copied 12: the break calls the latter.

A ``static`` backend is part of a segment: lengths are read from the device, and launches are made
for the longest sequence that the rows could hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.layer import Attention
from breakgraph.attention.packed_lengths import PackedLengths
from breakgraph.attention.tile_schedule import write_key_slots
from breakgraph.forward import ForwardBatch, HostStaging, LayerInputs
from breakgraph.kernels.packed_attention import packed_flash_attention


@dataclass(frozen=True, slots=True)
class _Plan:
    num_tokens: int
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: int
    max_k: int
    key_slots: torch.Tensor | None


class TorchFlashBackend(AttentionBackend):
    """Variable-length attention; a cached prefix is gathered from the KV pool.

    Args:
        device: a GPU, or a CPU for tests of the static plan.
        max_requests: the most requests of a forward.
        max_context_tokens: of a forward with its prefixes, what to make room for at first.
        static: keep the plan at fixed addresses, so that graphs can hold the launches. It then
            serves no cached prefix.
    """

    windows = True

    def __init__(
        self,
        *,
        device: torch.device,
        max_requests: int,
        max_context_tokens: int,
        static: bool = False,
    ) -> None:
        self.capturable, self.serves_prefixes = static, not static
        self._lengths: PackedLengths | None = None
        if static:
            self.max_requests, self._lengths = max_requests, PackedLengths(max_requests, device)
            return
        self._staging = HostStaging(max_requests + 1 + max_context_tokens, device)
        self._flash = torch.ops.aten._flash_attention_forward.default
        self._plan: _Plan | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [] if self._lengths is None else [self._lengths.cu_seqlens]

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        if self._lengths is not None:
            self._lengths.send(batch)
            return
        size = batch.batch_size
        key_lens = batch.extend_lens + batch.prefix_lens
        num_keys = int(key_lens.sum()) if batch.has_prefix else 0
        count = size + 1 + num_keys
        if count > self._staging.capacity:
            self._staging = HostStaging(2 * count, self._staging.device_buffer.device)
        host = self._staging.host()
        # Each int64 of the first size + 1 entries holds a pair of int32: both cu_seqlens.
        cu = host[: size + 1].view(np.int32)
        cu[0] = cu[size + 1] = 0
        np.cumsum(batch.extend_lens, out=cu[1 : size + 1])
        np.cumsum(key_lens, out=cu[size + 2 :])
        if num_keys:
            write_key_slots(batch, host[size + 1 : count])
        device = self._staging.send(count)
        cu_device = device[: size + 1].view(torch.int32)
        self._plan = _Plan(
            num_tokens=batch.num_tokens,
            cu_seqlens_q=cu_device[: size + 1],
            cu_seqlens_k=cu_device[size + 1 :],
            max_q=int(batch.extend_lens.max()),
            max_k=int(key_lens.max()),
            key_slots=device[size + 1 :] if num_keys else None,
        )

    def begin_layers(self, inputs: LayerInputs) -> None:
        if self._lengths is not None:
            end = self._lengths.cu_seqlens[-1:]
            rows = torch.arange(len(inputs.positions), dtype=end.dtype, device=end.device)
            self._is_token = (rows < end).view(-1, 1, 1)
            self._zero = inputs.hidden_states.new_zeros(())

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
            cu_seqlens = self._lengths.cu_seqlens
            packed_flash_attention(q, k, v, cu_seqlens, self._is_token, self._zero, *reach, out)
            return
        plan = self._plan
        if plan is None:
            raise RuntimeError("attention was called before init_forward_metadata planned a batch")
        if plan.key_slots is not None:
            k = layer.k_cache.index_select(0, plan.key_slots)
            v = layer.v_cache.index_select(0, plan.key_slots)
        if plan.num_tokens != out.shape[0]:
            # One token a request takes a path that wants exactly as many rows as requests.
            q, out = q[: plan.num_tokens], out[: plan.num_tokens]
        mixed = self._flash(
            q,
            k,
            v,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_q,
            plan.max_k,
            0.0,
            layer.right == 0,
            False,
            scale=layer.scale,
            window_size_left=layer.left,
            window_size_right=layer.right if layer.right != 0 else None,
        )[0]
        out.copy_(mixed)
