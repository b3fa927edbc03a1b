"""Attention by FlashInfer's FlashAttention-3, which reads cached prefixes where they lie.

A forward is planned once on the host and sent to the device in one copy; each layer is then one
launch that takes nothing but addresses. A ``static`` backend keeps its plan at fixed addresses,
with room for ``max_requests`` requests, so that the launch can be part of a segment: it is the same
for every batch, because the grid is the GPU's multiprocessors and the plan alone says what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.layer import Attention
from breakgraph.attention.tile_schedule import (
    ScheduleLayout,
    count_tiles,
    most_works,
    write_key_slots,
    write_schedule,
)
from breakgraph.forward import ForwardBatch, HostStaging
from breakgraph.kernels.flashinfer_prefill import (
    DTYPES,
    HEAD_DIMS,
    bound_launch,
    flashinfer_prefill,
    geometry,
    kernel_module,
    missing_for,
    plan_of,
    tail,
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """With no ``key_slots`` keys are the ``num_tokens`` new ones, where they were made."""

    num_tokens: int
    offsets: list[int]
    key_slots: torch.Tensor | None
    launch: Callable[..., None] | None


@dataclass(frozen=True, slots=True)
class _Cache:
    """A layer's cache as pages of one token, and the arguments that its launches end with."""

    of: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    tail: tuple[Any, ...]


class FlashInferBackend(AttentionBackend):
    """Causal attention of packed sequences over the KV pool, which is not copied.

    One request without a prefix has its keys read as they were made, in rows: 21 µs instead of 26
    for 1024 tokens of Qwen3-8B on an H200, 795 instead of 1012 for 8192. Several would gain as
    much, but a tile that reaches past a request's end multiplies its neighbour's values by zero,
    and a NaN of one would be a NaN of both; through the cache nothing past the end is read. Its
    pages are of one token, whatever ``--page-size``: pages of 16 saved 2% over prefixes of 4096
    and 8000 tokens.

    Args:
        like: an attention layer; all have its heads.
        dtype: of queries and caches.
        device: a Hopper GPU, or a CPU for tests.
        max_requests: the most requests of a forward.
        max_context_tokens: the most tokens of a forward, prefixes included, that a static plan
            holds; otherwise what to make room for at first.
        max_new_tokens: the most new ones; None for as many.
        static: keep the plan at fixed addresses, so that graphs can hold the launches.

    Raises:
        RuntimeError: on a GPU, where the kernels can be neither found nor compiled.
    """

    def __init__(
        self,
        like: Attention,
        dtype: torch.dtype,
        *,
        device: torch.device,
        max_requests: int,
        max_context_tokens: int,
        max_new_tokens: int | None = None,
        static: bool = False,
    ) -> None:
        self.capturable = static
        if static:
            self.max_requests = max_requests
        self._heads, self._kernels = like.num_heads, (dtype, like.head_dim)
        self._processors, self._tile = geometry(device, like.head_dim)
        self._device = device
        if device.type == "cuda":
            kernel_module(*self._kernels)
        new = min(max_new_tokens or max_context_tokens, max_context_tokens)
        self._max_new_tokens, self._max_context_tokens = new, max_context_tokens
        works = most_works(new, max_requests, self._tile, self._heads)
        self._room = ScheduleLayout(self._processors, works)
        self._make_staging(-(-(self._room.keys_start + max_context_tokens) // 2))
        self._plan: _Plan | None = None
        self._caches: dict[Attention, _Cache] = {}

    def tensors(self) -> list[torch.Tensor]:
        """What a capture may read."""
        return [self._staging.device_buffer]

    def _make_staging(self, entries: int) -> None:
        self._staging = HostStaging(entries, self._device)
        self._sent = self._staging.device_buffer.view(torch.int32)

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        tiles = count_tiles(batch.extend_lens, self._tile)
        if self.capturable:
            self._check_room(batch)
            layout, cached = self._room, True
        else:
            layout = ScheduleLayout(self._processors, int(tiles.sum()) * self._heads)
            cached = batch.has_prefix or batch.batch_size > 1
        end = layout.keys_start
        end += len(batch.prefix_slots) + batch.num_tokens if cached else 0
        count = -(-end // 2)  # int64 entries, each of which holds two
        if count > self._staging.capacity:
            self._make_staging(2 * count)
        host = self._staging.host()[:count].view(np.int32)
        key_lens = batch.extend_lens + batch.prefix_lens
        write_schedule(batch, key_lens, tiles, self._tile, self._heads, layout, host)
        if cached:
            write_key_slots(batch, host[layout.keys_start : end])
        self._staging.send(count)
        offsets, launch = plan_of(layout.table_start, layout.works), None
        key_slots = self._sent[layout.keys_start :] if cached else None
        if not self.capturable and self._device.type == "cuda":
            launch = bound_launch(*self._kernels, self._sent, offsets, key_slots)
        self._plan = _Plan(batch.num_tokens, offsets, key_slots, launch)

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        plan = self._plan
        if plan is None:
            raise RuntimeError("attention was called before init_forward_metadata planned a batch")
        if plan.key_slots is None and len(k) != plan.num_tokens:
            k, v = k[: plan.num_tokens], v[: plan.num_tokens]  # or padding is read, times zero
        if plan.launch is None:
            if self.capturable:
                out.zero_()  # the kernel leaves padded rows alone, and they were never written
            if plan.key_slots is not None:
                k, v = layer.k_cache, layer.v_cache
            flashinfer_prefill(q, k, v, self._sent, plan.offsets, plan.key_slots, layer.scale, out)
            return
        cache = self._caches.get(layer)
        if cache is None or cache.of is not layer.k_cache:
            cache = self._view(layer)
        if plan.key_slots is not None:
            k, v = cache.k_pages, cache.v_pages
        plan.launch(q, k, v, out, cache.tail)

    def _view(self, layer: Attention) -> _Cache:
        """What a launch takes of a layer, made once."""
        pages = layer.k_cache.unsqueeze(1), layer.v_cache.unsqueeze(1)
        cache = self._caches[layer] = _Cache(layer.k_cache, *pages, tail(layer.scale))
        return cache

    def _check_room(self, batch: ForwardBatch) -> None:
        keys = batch.num_tokens + len(batch.prefix_slots)
        for what, count, room in (
            ("requests", batch.batch_size, self.max_requests),
            ("new tokens", batch.num_tokens, self._max_new_tokens),
            ("tokens with their prefixes", keys, self._max_context_tokens),
        ):
            if room is not None and count > room:
                raise ValueError(
                    f"{count} {what} do not fit the {room} that the captured attention has room for"
                )


def unserved(layers: Sequence[Attention], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``FlashInferBackend`` cannot serve a model's ``layers``, as a sentence, or None."""
    if missing := missing_for(device):
        return missing
    if dtype not in DTYPES:
        return f"FlashAttention-3 computes in half precision, not in {dtype}: use --dtype bfloat16"
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in layers}
    if len(shapes) > 1:
        return f"the model's attention layers differ in their heads: {sorted(shapes)}"
    head_dim = layers[0].head_dim
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer has no FlashAttention-3 for heads of {head_dim}, only of {HEAD_DIMS}"
    limits = {limit for layer in layers for limit in getattr(layer, "limits", ())}
    if limits or any(layer.left is not None or layer.right != 0 for layer in layers):
        said = ", ".join(sorted(limits)) or "windows, or tokens that see later ones"
        return f"it serves causal attention alone, and the model has {said}"
    return None
