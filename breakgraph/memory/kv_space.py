"""Rows, slots and cached prefixes as one account.

What a request has computed is cached when it lets go of its row, so a slot is free, owned by a
running request, or in the tree; a cached slot that nobody has locked counts as available.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from breakgraph.memory.radix_cache import RadixCache, RadixNode
from breakgraph.memory.request_table import RequestTable


class KVSpace:
    """The slots of running requests and, with ``cache_prefixes``, of finished ones."""

    def __init__(self, table: RequestTable, cache_prefixes: bool = True) -> None:
        self.table = table
        self.page_size = table.allocator.page_size
        self.cache = RadixCache(table.allocator) if cache_prefixes else None
        self._nodes: dict[int, RadixNode] = {}

    @property
    def available_pages(self) -> int:
        """Pages that are free, or cached and in nobody's use."""
        evictable = self.cache.evictable_tokens if self.cache else 0
        return (self.table.allocator.available_tokens + evictable) // self.page_size

    @property
    def is_empty(self) -> bool:
        """True when no request holds a row or a slot; cached prefixes may remain."""
        rows = self.table.available_rows == len(self.table.table)
        return rows and self.available_pages == self.table.allocator.num_pages

    def cached_prefix(self, ids: Sequence[int]) -> int:
        """How many leading tokens of ``ids`` are cached."""
        return len(self.cache.match(ids)[1]) if self.cache else 0

    def acquire(self, ids: Sequence[int] = ()) -> tuple[int, int]:
        """A row that begins with the longest cached prefix of ``ids``, and its length."""
        if self.cache is None or not len(ids):
            return self.table.acquire(), 0
        node, slots = self.cache.match(ids)
        row = self.table.acquire(slots)
        self.cache.lock(node)
        self._nodes[row] = node
        return row, len(slots)

    def can_extend(self, row: int, count: int) -> bool:
        return self.table.pages_to_extend(row, count) <= self.available_pages

    def extend(self, row: int, count: int) -> np.ndarray:
        """Slots for ``count`` more tokens of ``row``, evicting what they need.

        Raises:
            OutOfSlotsError: ``can_extend`` is False; the row stays as it was.
        """
        self._free_pages(self.table.pages_to_extend(row, count))
        return self.table.extend(row, count)

    def extend_each(self, rows: np.ndarray) -> np.ndarray | None:
        """A slot for one more token of each of ``rows``; None, and none taken, if too few are."""
        pages = int((self.table.lengths[rows] % self.page_size == 0).sum())
        if pages > self.available_pages:
            return None
        self._free_pages(pages)
        return self.table.extend_each(rows)

    def share(self, row: int, ids: Sequence[int]) -> None:
        """Let others use the whole pages of ``ids``, all computed, while ``row`` goes on."""
        if self.cache is None:
            return
        end = len(ids) // self.page_size * self.page_size
        borrowed = int(self.table.borrowed[row])
        # Where another request has cached the same tokens meanwhile, the row keeps its own.
        if end <= borrowed or self.cached_prefix(ids[:end]) != borrowed:
            return
        node, _ = self.cache.insert(ids[:end], self.table.slots(row)[:end])
        self.cache.lock(node)
        self._unlock(row)
        self._nodes[row] = node
        self.table.disown(row, end)

    def release(self, row: int, ids: Sequence[int] = ()) -> None:
        """Give back ``row``; the whole pages of ``ids``, all computed, are cached."""
        kept = (0, 0)
        end = len(ids) // self.page_size * self.page_size
        if self.cache is not None and end:
            _, known = self.cache.insert(ids[:end], self.table.slots(row)[:end])
            kept = (known, end)
        self._unlock(row)
        self.table.release(row, kept)

    def flush(self) -> None:
        """Forget every cached prefix that no running request uses."""
        if self.cache is not None:
            self.cache.evict(self.cache.evictable_tokens)

    def _free_pages(self, pages: int) -> None:
        """Evict until so many pages are free, if so many can be."""
        short = pages * self.page_size - self.table.allocator.available_tokens
        if short > 0 and self.cache is not None and short <= self.cache.evictable_tokens:
            self.cache.evict(short)

    def _unlock(self, row: int) -> None:
        node = self._nodes.pop(row, None)
        if node is not None and self.cache is not None:
            self.cache.unlock(node)
