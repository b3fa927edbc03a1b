"""Rows, slots and cached prefixes as one account.

What a request has computed is cached when it lets go of its row, so a slot is free, owned by a
running request, or in the tree; a cached slot that nobody has locked counts as available.

With recurrent states a cached prefix is of use only where the state after its last token was
saved: a hit restores the state saved at its end, or is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from breakgraph.memory.radix_cache import RadixCache, RadixNode
from breakgraph.memory.rank_memory import StateSlots
from breakgraph.memory.request_table import RequestTable
from breakgraph.memory.state_cache import StateCache


class KVSpace:
    """The slots of running requests and, with ``cache_prefixes``, of finished ones.

    Attributes:
        table: the rows.
        page_size: tokens of a page.
        states: saved recurrent states; None where the model has none, or nothing is cached.
        cache: cached prefixes; None where nothing is cached, as with no slot to save a state in.
    """

    def __init__(
        self, table: RequestTable, cache_prefixes: bool = True, states: StateSlots | None = None
    ) -> None:
        self.table = table
        self.page_size = table.allocator.page_size
        if states is not None and not states.snapshots:
            cache_prefixes = False
        self.states = StateCache(states) if states is not None and cache_prefixes else None
        self.cache = RadixCache(table.allocator, self.states) if cache_prefixes else None
        self._nodes: dict[int, RadixNode] = {}
        self._branches: dict[int, int] = {}

    @property
    def available_pages(self) -> int:
        """Pages that are free, or cached and in nobody's use."""
        evictable = self.cache.evictable_tokens if self.cache else 0
        return (self.table.allocator.available_tokens + evictable) // self.page_size

    @property
    def is_empty(self) -> bool:
        """True when no request holds a row or a slot; cached prefixes may remain."""
        rows = self.table.available_rows == len(self.table.table)
        sound = self.states is None or self.states.is_sound
        return rows and sound and self.available_pages == self.table.allocator.num_pages

    def cached_prefix(self, ids: Sequence[int]) -> int:
        """How many leading tokens of ``ids`` are cached."""
        return len(self.cache.match(ids)[1]) if self.cache else 0

    def acquire(self, ids: Sequence[int] = ()) -> tuple[int, int]:
        """A row that begins with the longest usable prefix of ``ids``, and its length."""
        if self.cache is None or not len(ids):
            return self.table.acquire(), 0
        node, slots = self.cache.match(ids)
        branch = len(slots)
        if self.states is not None:
            node = self.states.deepest(node)
            slots = slots[: node.end]
        row = self.table.acquire(slots)
        self.cache.lock(node)
        self._nodes[row] = node
        if self.states is not None:
            self.states.restore(node, row)
            self._branches[row] = branch
        return row, len(slots)

    def branch(self, row: int) -> int:
        """How many leading tokens of ``row`` were cached when it was acquired, with a state or not.

        Others have these tokens too, so a state saved at their end is of use to the next such
        prompt; 0 where states are not saved.
        """
        return self._branches.get(row, 0)

    def extend(self, row: int, count: int) -> np.ndarray:
        """Slots for ``count`` more tokens of ``row``, evicting what they need.

        Raises:
            OutOfSlotsError: they take more than ``available_pages``; the row stays as it was.
        """
        self._free_pages(self.table.pages_to_extend(row, count))
        return self.table.extend(row, count)

    def extend_each(self, rows: np.ndarray, counts: np.ndarray | int = 1) -> np.ndarray | None:
        """Slots for ``counts`` more tokens of each of ``rows``; None, and none taken, if too few
        are there."""
        lengths = self.table.lengths[rows]
        pages = self.table.allocator.pages_to_grow(lengths, lengths + counts)
        if pages > self.available_pages:
            return None
        self._free_pages(pages)
        return self.table.extend_each(rows, counts)

    def share(self, row: int, ids: Sequence[int]) -> None:
        """Let others use the whole pages of ``ids``, just computed, while ``row`` goes on.

        Where another request has cached the same tokens meanwhile, the row keeps its own. But with
        recurrent states a row often computes what is cached, for want of a state, and it goes on
        with the other's slots: else what follows could not be cached before the row is released.
        """
        if self.cache is None:
            return
        end = len(ids) // self.page_size * self.page_size
        borrowed = int(self.table.borrowed[row])
        if end <= borrowed or (self.states is None and self.cached_prefix(ids[:end]) != borrowed):
            return
        slots = self.table.slots(row)[:end]
        node, known = self.cache.insert(ids[:end], slots)
        self.cache.lock(node)
        self._unlock(row)
        self._nodes[row] = node
        if known > borrowed:
            _, slots = self.cache.match(ids[:end])
        self.table.disown(row, slots, known)
        if self.states is not None and end == len(ids):
            self.states.save(node, row)

    def release(self, row: int, ids: Sequence[int] = (), *, failed: bool = False) -> None:
        """As ``release_each``, of one row."""
        self.release_each([(row, ids, failed)])

    def release_each(self, ended: Sequence[tuple[int, Sequence[int], bool]]) -> None:
        """Give back rows; the whole pages of what they have computed are cached.

        Args:
            ended: held rows, all different; of each the tokens that it has computed, and whether a
                forward that began from them failed, and has left no state or a wrong one.
        """
        kept = [self._cache(*each) for each in ended]
        rows = [row for row, _, _ in ended]
        for row in rows:
            self._unlock(row)
            self._branches.pop(row, None)
        self.table.release_each(rows, kept)

    def _cache(self, row: int, ids: Sequence[int], failed: bool) -> tuple[int, int]:
        """Begin and end of the tokens of ``row`` whose slots are the tree's from now on."""
        end = len(ids) // self.page_size * self.page_size
        if self.cache is None or not end:
            return 0, 0
        node, known = self.cache.insert(ids[:end], self.table.slots(row)[:end])
        if self.states is not None and end == len(ids) and not failed:
            self.states.save(node, row)
        return known, end

    def flush(self) -> None:
        """Forget every cached prefix that no running request uses, and every saved state."""
        if self.cache is not None:
            self.cache.evict(self.cache.evictable_tokens)
        if self.states is not None:
            self.states.clear()

    def _free_pages(self, pages: int) -> None:
        """Evict until so many pages are free, if so many can be."""
        short = pages * self.page_size - self.table.allocator.available_tokens
        if short > 0 and self.cache is not None and short <= self.cache.evictable_tokens:
            self.cache.evict(short)

    def _unlock(self, row: int) -> None:
        node = self._nodes.pop(row, None)
        if node is not None and self.cache is not None:
            self.cache.unlock(node)
