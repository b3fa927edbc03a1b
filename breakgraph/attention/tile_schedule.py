"""The plan of a persistent attention kernel: which processor computes which tiles, in what order.

Every query tile of every head is one work, dealt to exactly one processor, dear ones first. The
plan follows from host lengths alone and all of it is int32 data of one buffer, whose layout depends
on how many works there is room for and on nothing else: so a captured kernel serves every batch
that its room can hold.

Works are sorted by cost and dealt back and forth: 0 to n - 1, n - 1 to 0, and so on. The busiest
processor of 132 is then at most 3% over an even share (1024 to 8192 tokens, one request or ten of
random lengths), as it is when each work goes to the least loaded (Graham, "Bounds on
multiprocessing timing anomalies", 1969); but whose turn it is follows from counts alone and is
remembered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from breakgraph.forward import ForwardBatch

IntArray = np.ndarray
Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True, slots=True)
class ScheduleLayout:
    """Where the int32 arrays of a schedule lie, one after the other, the slots of keys last.

    Attributes:
        processors: that works are dealt to.
        works: that there is room for.
    """

    processors: int
    works: int

    @property
    def table_start(self) -> int:
        return -(-(self.processors + 1) // 4) * 4  # kernels like 16 bytes

    @property
    def keys_start(self) -> int:
        return self.table_start + 6 * self.works

    def split(self, whole: Array) -> tuple[Array, Array]:
        """``ends`` ``[processors + 1]``, where the works of each begin, and the table of works.

        The table is ``[6, works]``: which tile of its request, the request's first query row, its
        first key, its queries, its keys, and the head.
        """
        table = whole[self.table_start : self.keys_start]
        return whole[: self.processors + 1], table.reshape(6, -1)


def most_works(rows: int, requests: int, tile: int, heads: int) -> int:
    """The most works of ``rows`` new tokens of at most ``requests`` requests."""
    return heads * min(rows, (rows + requests * (tile - 1)) // tile)


def count_tiles(extend_lens: IntArray, tile: int) -> IntArray:
    """int32 ``[batch_size]``, the query tiles of each request."""
    return -(-extend_lens // np.int32(tile))


def write_schedule(
    batch: ForwardBatch,
    key_lens: IntArray,
    tiles: IntArray,
    tile: int,
    heads: int,
    layout: ScheduleLayout,
    into: IntArray,
) -> None:
    """Write the schedule of causal attention of ``batch``, all but the slots of its keys.

    Args:
        batch: its lengths.
        key_lens: int32 ``[batch_size]``, keys of each request, which lie one after the other.
        tiles: of ``count_tiles``.
        tile: query rows of a tile.
        heads: of the queries.
        layout: with room for ``heads * tiles.sum()`` works.
        into: int32, at least ``layout.keys_start`` long.
    """
    count, new_lens = int(tiles.sum()), batch.extend_lens
    ends, table = layout.split(into)
    rank, head, shares = _deal(count, heads, layout.processors)
    table = table[:, : len(rank)]
    ends[:], table[5] = shares, head
    if len(tiles) == 1:  # the longest tile is the last: a third of the calls below
        np.subtract(count - 1, rank, out=table[0])
        table[1:3], table[3], table[4] = 0, new_lens[0], key_lens[0]
        return
    by_request = np.empty((5, len(tiles)), np.int32)
    for row, lens in ((0, tiles), (1, new_lens), (2, key_lens)):
        by_request[row, 0] = 0
        np.add.accumulate(lens[:-1], out=by_request[row, 1:])  # np.cumsum takes 2 µs, not 1
    by_request[3], by_request[4] = new_lens, key_lens
    by_tile = by_request.repeat(tiles, axis=1)
    np.subtract(np.arange(count, dtype=np.int32), by_tile[0], out=by_tile[0])
    # A causal tile sees the prefix and the new tokens up to its own last, none past the request.
    unseen = np.maximum(by_tile[3] - (by_tile[0] + 1) * np.int32(tile), 0)
    ranked = (unseen - by_tile[4]).argsort(kind="stable")
    by_tile.take(ranked[rank], axis=1, out=table[:5], mode="clip")


@lru_cache(maxsize=256)
def _deal(tiles: int, heads: int, processors: int) -> tuple[IntArray, IntArray, IntArray]:
    """Deal ``heads`` works of each tile back and forth, dearest first.

    Returns:
        Of each work the tile's rank by cost and the head, and where each processor's works begin
        (``[processors + 1]``), all int32.
    """
    works = tiles * heads
    laps = np.arange(-(-works // processors) * processors).reshape(-1, processors)
    laps[1::2] = laps[1::2, ::-1].copy()
    dealt = laps < works
    order = laps.T[dealt.T].astype(np.int32)
    ends = np.zeros(processors + 1, np.int32)
    np.cumsum(dealt.sum(0), out=ends[1:])
    return order // np.int32(heads), order % np.int32(heads), ends


def write_key_slots(batch: ForwardBatch, into: IntArray) -> None:
    """Write the slot of every key: each request's prefix, then its new tokens.

    Args:
        batch: of whom each request's new tokens are stored already.
        into: ``[tokens and prefixes of the batch]``, of any integer type that holds slots.
    """
    if not batch.has_prefix:
        into[:] = batch.out_cache_loc
        return
    at = new = old = 0
    for extend, prefix in zip(batch.extend_lens.tolist(), batch.prefix_lens.tolist(), strict=True):
        into[at : at + prefix] = batch.prefix_slots[old : old + prefix]
        into[at + prefix : at + prefix + extend] = batch.out_cache_loc[new : new + extend]
        at, new, old = at + prefix + extend, new + extend, old + prefix
