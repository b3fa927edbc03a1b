"""Captured attention of few rows, by a kernel that is made for them; more rows go elsewhere.

A forward's rows say which of the two attends, at capture and at replay alike, so each graph holds
the launches of one, and a replay plans that one alone.
"""

from __future__ import annotations

import numpy as np
import torch

from breakgraph.attention.base import AttentionBackend, Refusal
from breakgraph.attention.layer import Attention
from breakgraph.attention.tile_schedule import count_tiles, most_works, write_key_slots
from breakgraph.forward import ForwardBatch, HostStaging, LayerInputs
from breakgraph.kernels.tiled_attention import LONG_ROWS, rows_of_tile, tiled_attention


class TiledBackend(AttentionBackend):
    """Causal attention of packed sequences over the KV pool, planned at fixed addresses.

    Args:
        like: an attention layer; all have its heads.
        device: of the model.
        max_requests: the most requests of a forward.
        max_context_tokens: the most tokens of a forward, prefixes included.
        max_new_tokens: the most rows.
    """

    capturable = True
    max_requests: int

    def __init__(
        self,
        like: Attention,
        *,
        device: torch.device,
        max_requests: int,
        max_context_tokens: int,
        max_new_tokens: int,
    ) -> None:
        self.max_requests, self._max_context_tokens = max_requests, max_context_tokens
        self.max_new_tokens = max_new_tokens
        self._tile = rows_of_tile(like.num_heads, like.num_kv_heads)
        room = most_works(max_new_tokens, max_requests, self._tile, 1)
        self._room = -(-room // 4) * 4  # kernels like 16 bytes
        entries = 4 * self._room + max_context_tokens
        self._staging = HostStaging(-(-entries // 2), device)  # int64, each of which holds two
        self._sent = self._staging.device_buffer.view(torch.int32)
        self._tiles = self._sent[: 4 * self._room].view(4, self._room)
        self._key_slots = self._sent[4 * self._room :]
        if device.type == "cuda":  # compile now, or a capture would
            for rows in {min(rows, max_new_tokens) for rows in (1, LONG_ROWS)}:
                heads = rows, like.num_heads, like.head_dim
                q = torch.zeros(heads, dtype=like.k_cache.dtype, device=device)
                self.forward(like, q, q, q, q)

    def tensors(self) -> list[torch.Tensor]:
        return [self._staging.device_buffer]

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        keys = batch.num_tokens + len(batch.prefix_slots)
        if batch.batch_size > self.max_requests or keys > self._max_context_tokens:
            raise ValueError(
                f"{batch.batch_size} requests of {keys} tokens with their prefixes do not fit the "
                f"{self.max_requests} and {self._max_context_tokens} that the captured attention "
                "has room for"
            )
        count = -(-(4 * self._room + keys) // 2)
        host = self._staging.host()[:count].view(np.int32)
        table = host[: 4 * self._room].reshape(4, self._room)
        self._write_tiles(batch, table)
        write_key_slots(batch, host[4 * self._room : 4 * self._room + keys])
        self._staging.send(count)

    def _write_tiles(self, batch: ForwardBatch, table: np.ndarray) -> None:
        new, prefix, tile = batch.extend_lens, batch.prefix_lens, self._tile
        count = -(-int(new[0]) // tile)
        first: np.ndarray | int = 0
        key: np.ndarray | int = 0
        at = np.arange(0, count * tile, tile, dtype=np.int32)
        if len(new) > 1:
            tiles = count_tiles(new, tile)
            ends = tiles.cumsum(dtype=np.int32)
            count = int(ends[-1])
            by_request = np.empty((5, len(new)), np.int32)
            by_request[0] = (tiles - ends) * tile
            by_request[1:3, 0] = 0
            np.cumsum(new[:-1], out=by_request[1, 1:])
            np.cumsum(new[:-1] + prefix[:-1], out=by_request[2, 1:])
            by_request[3], by_request[4] = new, prefix
            at, first, key, new, prefix = by_request.repeat(tiles, axis=1)
            at += np.arange(0, count * tile, tile, dtype=np.int32)
        np.add(first, at, out=table[0, :count])
        np.minimum(new - at, tile, out=table[1, :count])
        table[1, count:], table[2, :count] = 0, key
        np.add(at, prefix + 1, out=table[3, :count])

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        count = most_works(len(q), self.max_requests, self._tile, 1)
        tiled_attention(
            *(q, layer.k_cache, layer.v_cache, self._tiles, self._key_slots, count),
            *(layer.scale, out),
        )


class ByRowsBackend(AttentionBackend):
    """``few`` for forwards of as many rows as it takes, ``many`` for those of more."""

    capturable = True

    def __init__(self, few: TiledBackend, many: AttentionBackend) -> None:
        self.few, self.many = few, many
        self.max_requests, self.serves_prefixes = many.max_requests, many.serves_prefixes

    def tensors(self) -> list[torch.Tensor]:
        return [*self.few.tensors(), *self.many.tensors()]

    def refuses(self, batch: ForwardBatch) -> Refusal | None:
        return self.many.refuses(batch)

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        rows = batch.num_tokens if rows is None else rows
        self._taken_by(rows).init_forward_metadata(batch, rows)

    def begin_layers(self, inputs: LayerInputs) -> None:
        self._taken_by(len(inputs.positions)).begin_layers(inputs)

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._taken_by(len(q)).forward(layer, q, k, v, out)

    def _taken_by(self, rows: int) -> AttentionBackend:
        return self.few if rows <= self.few.max_new_tokens else self.many
