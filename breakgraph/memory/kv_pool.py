"""The keys and values of every cached token, at addresses that never change.

Captured segments store into these buffers, so they are made once, before any capture, and
live as long as the graphs. Page 0 belongs to nobody: padded rows of a replay store to its
slot 0, and no request may ever be given it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class CachedLayer(Protocol):
    """What the pool asks of an attention layer."""

    num_kv_heads: int
    head_dim: int
    k_cache: torch.Tensor
    v_cache: torch.Tensor


class KVPool:
    """Keys and values of ``num_tokens`` tokens (whole pages of them) and the reserved page.

    Attributes:
        k: per layer ``[num_slots, num_kv_heads, head_dim]``, zeros at first.
        v: as ``k``; empty where values lie in the keys, as those of latent attention do.
        num_tokens: slots that requests may hold, a multiple of ``page_size``.
        num_slots: ``num_tokens`` and the reserved page.
    """

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = 1,
        *,
        with_values: bool = True,
    ) -> None:
        """Allocate the buffers, those of values only ``with_values``.

        Raises:
            ValueError: not even one page fits into ``num_tokens``.
            RuntimeError: the device has not the memory.
        """
        self.num_tokens = whole_pages(num_tokens, page_size) * page_size
        self.num_slots = self.num_tokens + page_size
        shape = (self.num_slots, num_kv_heads, head_dim)
        try:
            count = (2 if with_values else 1) * num_layers
            buffers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]
        except torch.OutOfMemoryError as error:
            per_token = self.bytes_per_token(
                num_layers, num_kv_heads, head_dim, dtype, with_values=with_values
            )
            raise RuntimeError(
                f"a KV pool of {self.num_tokens} tokens takes "
                f"{self.num_slots * per_token / 2**30:.2f} GiB, which {device} does not have; "
                "lower --max-total-tokens or --mem-fraction-static"
            ) from error
        self.k, self.v = buffers[:num_layers], buffers[num_layers:]

    @staticmethod
    def bytes_per_token(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        with_values: bool = True,
    ) -> int:
        """Bytes that one token takes over all layers, keys and, ``with_values``, values."""
        return (2 if with_values else 1) * num_layers * num_kv_heads * head_dim * dtype.itemsize

    def bind(self, attention_layers: Sequence[CachedLayer]) -> None:
        """Give each layer its buffers, in order. Raises ValueError where they do not fit it."""
        if len(attention_layers) != len(self.k):
            raise ValueError(
                f"a KV pool of {len(self.k)} layers cannot serve {len(attention_layers)}"
            )
        values = self.v or [k[:0] for k in self.k]
        for index, (layer, k, v) in enumerate(zip(attention_layers, self.k, values, strict=True)):
            if (layer.num_kv_heads, layer.head_dim) != tuple(k.shape[1:]):
                raise ValueError(
                    f"attention layer {index} has {layer.num_kv_heads} KV heads of "
                    f"{layer.head_dim}, the KV pool {k.shape[1]} of {k.shape[2]}"
                )
            layer.k_cache, layer.v_cache = k, v

    def tensors(self) -> list[torch.Tensor]:
        """Every buffer: what a capture may read and write."""
        return [*self.k, *self.v]


def whole_pages(num_tokens: int, page_size: int) -> int:
    """Pages in ``num_tokens``, rounded down. Raises ValueError unless there is one."""
    if page_size < 1:
        raise ValueError(f"--page-size is {page_size}; it must be at least 1")
    if num_tokens < page_size:
        raise ValueError(
            f"a KV pool of {num_tokens} tokens has no room for one page of {page_size}; "
            "raise --max-total-tokens or lower --page-size"
        )
    return num_tokens // page_size
