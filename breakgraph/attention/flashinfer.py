"""Attention by FlashInfer's FlashAttention-3, which reads cached prefixes where they lie.

A forward is planned once on the host and sent to the device in one copy; each layer is then one
launch that takes nothing but addresses. A ``static`` backend keeps its plan at fixed addresses,
with room for ``max_requests`` requests, so that the launch can be part of a segment: it is the same
for every batch, because the grid is the GPU's multiprocessors and the plan alone says what they do.
Of many rows it is two launches, one that reads keys in rows and one that finds them in the cache,
and the plan gives all the work to one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.layer import Attention, beyond_causal
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

IN_ROWS = 1024
"""The fewest rows of which a static plan can read keys in rows. To do so costs a launch without
work, 2.5 µs. On an H200 in bfloat16, 32 heads of 128 over 8, it saves 4.6 of 26 µs for 1024 tokens,
12.6 of 76 for 2048 and 66 of 277 for 4096."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """With no ``key_slots`` keys are the ``num_tokens`` new ones, where they were made.

    Of a static plan of many rows, ``in_rows`` are the offsets of a launch that reads them there.
    """

    num_tokens: int
    offsets: list[int]
    key_slots: torch.Tensor | None
    launch: Callable[..., None] | None
    in_rows: list[int] | None


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
    and a NaN of one would be a NaN of both; through the cache nothing past the end is read. A
    static plan meets padding there, which is finite in bfloat16 and may overflow in float16: that
    reads the cache alone. Its pages are of one token, whatever ``--page-size``: pages of 16 saved
    2% over prefixes of 4096 and 8000 tokens.

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
        # A static plan begins with the ends of the launch that reads rows.
        self._start = self._room.table_start if static and dtype != torch.float16 else 0
        self._make_staging(self._start + self._room.keys_start + max_context_tokens)
        self._plan: _Plan | None = None
        self._static_plans: dict[bool, _Plan] = {}
        self._caches: dict[Attention, _Cache] = {}

    def tensors(self) -> list[torch.Tensor]:
        """What a capture may read."""
        return [self._staging.device_buffer]

    def _make_staging(self, entries: int) -> None:
        self._staging = HostStaging(entries, self._device, torch.int32)
        self._sent = self._staging.device_buffer

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        tiles = count_tiles(batch.extend_lens, self._tile)
        if self.capturable:
            self._check_room(batch)
            layout = self._room
        else:
            layout = ScheduleLayout(self._processors, int(tiles.sum()) * self._heads)
        in_rows = self._start > 0 and (rows or batch.num_tokens) >= IN_ROWS
        cached = batch.has_prefix or batch.batch_size > 1 or (self.capturable and not in_rows)
        start, keys_start = self._start, self._start + layout.keys_start
        end = keys_start + (len(batch.prefix_slots) + batch.num_tokens if cached else 0)
        if end > self._staging.capacity:
            self._make_staging(2 * end)
        host = self._staging.host()
        key_lens = batch.extend_lens + batch.prefix_lens
        write_schedule(batch, key_lens, tiles, self._tile, self._heads, layout, host[start:])
        if start:
            ends = host[: 2 * start].reshape(2, -1)
            ends[0] = 0 if cached else ends[1]
            ends[1] = ends[1] if cached else 0
        if cached:
            write_key_slots(batch, host[keys_start:end])
        self._staging.send(end)
        if self.capturable:
            self._plan = self._static_plan(in_rows)
            return
        offsets, launch = plan_of(0, layout.table_start, layout.works), None
        key_slots = self._sent[keys_start:] if cached else None
        if self._device.type == "cuda":
            launch = bound_launch(*self._kernels, self._sent, offsets, key_slots)
        self._plan = _Plan(batch.num_tokens, offsets, key_slots, launch, None)

    def _static_plan(self, in_rows: bool) -> _Plan:
        """What captures need, the same for all batches; made once."""
        if (found := self._static_plans.get(in_rows)) is None:
            start, room = self._start, self._room
            table = start + room.table_start, room.works
            key_slots = self._sent[start + room.keys_start :]
            read = plan_of(0, *table) if in_rows else None
            found = _Plan(self._max_new_tokens, plan_of(start, *table), key_slots, None, read)
            self._static_plans[in_rows] = found
        return found

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
            how = layer.scale, out
            if plan.in_rows is not None:
                flashinfer_prefill(q, k, v, self._sent, plan.in_rows, None, *how)
            if plan.key_slots is not None:
                k, v = layer.k_cache, layer.v_cache
            flashinfer_prefill(q, k, v, self._sent, plan.offsets, plan.key_slots, *how)
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
    head_dim = layers[0].head_dim
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer has no FlashAttention-3 for heads of {head_dim}, only of {HEAD_DIMS}"
    return beyond_causal(layers)
