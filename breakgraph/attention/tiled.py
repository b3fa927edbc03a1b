"""Attention of few rows, by a kernel that is made for them; more rows go elsewhere.

The rows that a forward is planned for say who attends, so what a graph has captured is what every
replay of it plans.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import torch

from breakgraph.attention.base import AttentionBackend, Refusal
from breakgraph.attention.layer import Attention
from breakgraph.attention.tile_schedule import most_works, write_key_slots
from breakgraph.forward import ForwardBatch, HostStaging, LayerInputs
from breakgraph.kernels.tiled_attention import (
    LONG_ROWS,
    rows_of_tile,
    tiled_attention,
    tiled_attention_on_cuda,
    workspace,
)

SHORT = 128
"""Tokens of a batch's longest sequence up to which the tiled kernel takes any number of rows, where
FlashAttention-2 would have them."""


class TiledBackend(AttentionBackend):
    """Attention of packed sequences, over the KV pool where it is causal.

    Args:
        like: an attention layer; all have its heads, and see as far.
        device: of the model.
        max_requests: the most requests of a forward.
        max_context_tokens: the most tokens of a forward, prefixes included, that a static plan
            holds; otherwise what to make room for at first.
        max_new_tokens: the most rows.
        static: keep the plan at fixed addresses, so that graphs can hold the launches.
    """

    def __init__(
        self,
        like: Attention,
        *,
        device: torch.device,
        max_requests: int,
        max_context_tokens: int,
        max_new_tokens: int,
        static: bool = False,
    ) -> None:
        self.capturable = static
        if static:
            self.max_requests = max_requests
        self._slots, self.max_new_tokens = max_requests, max_new_tokens
        self._tile, self._count = rows_of_tile(like.num_heads, like.num_kv_heads), 1
        self._causal, self._long = like.right == 0, False
        self._workspace = workspace(like.num_heads, like.num_kv_heads, like.head_dim, device)
        room = most_works(max_new_tokens, max_requests, self._tile, 1)
        self._room = -(-room // 4) * 4  # kernels like 16 bytes
        self._device, self._most_keys = device, max_context_tokens
        # What a table's columns differ by from tile to tile of a request.
        each = np.array([[1], [-1], [0], [int(self._causal)]], np.int32) * self._tile
        self._steps = each * np.arange(self._room, dtype=np.int32)
        # In a break what the op would tell a capture is of no use, and only keeps the host.
        direct = device.type == "cuda" and not static
        self._launch = tiled_attention_on_cuda if direct else tiled_attention
        self._make_staging(max_context_tokens)
        if device.type == "cuda":  # compile now, or a capture would
            zeros = partial(torch.zeros, dtype=like.k_cache.dtype, device=device)
            q = zeros(1, like.num_heads, like.head_dim)
            k = zeros(1, like.num_kv_heads, like.head_dim)
            for plan in product((self._room, 1), (True, False)):
                self._count, self._long = plan
                self.forward(like, q, k, k, q)

    def tensors(self) -> list[torch.Tensor]:
        return [self._staging.device_buffer, *self._workspace]

    def _make_staging(self, keys: int) -> None:
        self._staging = HostStaging(4 * self._room + keys, self._device, torch.int32)
        sent = self._staging.device_buffer
        self._tiles = sent[: 4 * self._room].view(4, self._room)
        self._key_slots = sent[4 * self._room :]

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        keys = batch.num_tokens + len(batch.prefix_slots)
        if self.capturable:
            self._check_room(batch, keys)
        start = 4 * self._room
        if start + keys > self._staging.capacity:
            self._make_staging(2 * keys)
        host = self._staging.host()
        tiles = self._write_tiles(batch, host[:start].reshape(4, self._room))
        slots = host[start : start + keys]
        if self._causal:
            write_key_slots(batch, slots)
        else:
            slots[:] = np.arange(keys)  # keys are read in rows, where they were made
        self._staging.send(start + keys)
        if self.capturable:  # a launch is the same for all batches of so many rows
            longest = rows or batch.num_tokens
            tiles = most_works(longest, self._slots, self._tile, 1)
        else:
            longest = int(batch.extend_lens.max())
        self._count, self._long = tiles, longest >= LONG_ROWS

    def _check_room(self, batch: ForwardBatch, keys: int) -> None:
        if batch.batch_size > self._slots or keys > self._most_keys:
            raise ValueError(
                f"{batch.batch_size} requests of {keys} tokens with their prefixes do not fit the "
                f"{self._slots} and {self._most_keys} that the captured attention has room for"
            )

    def _write_tiles(self, batch: ForwardBatch, table: np.ndarray) -> int:
        """Write the table of ``tiled_attention``; how many tiles there are.

        Requests are few and go through lists, tiles may be many and go through arrays: in a
        forward on an H200's host a call of numpy took 2 µs.
        """
        tile, row, key, done = self._tile, 0, 0, 0
        first, counts = [], []  # of each request: its column of the table, were it the tile 0
        for new, prefix in zip(batch.extend_lens.tolist(), batch.prefix_lens.tolist(), strict=True):
            before = done * tile
            seen = prefix + 1 - before if self._causal else new
            first.append((row - before, new + before, key, seen))
            counts.append(-(-new // tile))
            row, key, done = row + new, key + new + prefix, done + counts[-1]
        by_tile = np.array(first, np.int32).T
        if len(counts) > 1:
            by_tile = by_tile.repeat(counts, axis=1)
        np.add(by_tile, self._steps[:, :done], out=table[:, :done])
        np.minimum(table[1], tile, out=table[1])
        table[1, done:] = 0
        return done

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if self._causal:
            k, v = layer.k_cache, layer.v_cache
        plan = self._tiles, self._key_slots, self._count, self._causal, self._long
        self._launch(q, k, v, *plan, layer.scale, out, *self._workspace)


class ByRowsBackend(AttentionBackend):
    """``few`` for forwards of up to ``most`` rows, ``many`` for those of more.

    Unless the plan is static, ``few`` also has what fits it of ``short`` sequences alone.
    """

    def __init__(
        self, few: TiledBackend, many: AttentionBackend, most: int, short: int = 0
    ) -> None:
        self.few, self.many, self.most = few, many, most
        self.short = 0 if many.capturable else short
        self._planned: AttentionBackend = many
        self.capturable, self.max_requests = many.capturable, many.max_requests
        self.serves_prefixes, self.windows = many.serves_prefixes, many.windows

    @property
    def name(self) -> str:
        return f"{self.few.name} to {self.most} rows, else {self.many.name}"

    def tensors(self) -> list[torch.Tensor]:
        return [*self.few.tensors(), *self.many.tensors()]

    def refuses(self, batch: ForwardBatch) -> Refusal | None:
        return self.many.refuses(batch)

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        rows = batch.num_tokens if rows is None else rows
        few = rows <= self.most or (self.short and int(batch.extend_lens.max()) <= self.short)
        self._planned = self.few if few else self.many
        self._planned.init_forward_metadata(batch, rows)

    def begin_layers(self, inputs: LayerInputs) -> None:
        self._planned.begin_layers(inputs)

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._planned.forward(layer, q, k, v, out)
