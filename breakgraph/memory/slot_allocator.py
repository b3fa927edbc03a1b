"""Which slots of the KV pool are free.

Slots are handed out by whole pages: token ``i`` of a request lies in its page
``i // page_size`` at offset ``i % page_size``, so a page never serves two requests, and page 0,
where padded rows store, serves none.
"""

from __future__ import annotations

import numpy as np

from breakgraph.memory.kv_pool import whole_pages


class OutOfSlotsError(RuntimeError):
    """The KV pool has too few free slots; nothing was taken."""


class SlotAllocator:
    """Hands out the slots of a KV pool of ``num_tokens`` tokens; knows no requests.

    Raises:
        ValueError: not even one page fits into ``num_tokens``.
    """

    def __init__(self, num_tokens: int, page_size: int = 1) -> None:
        self.page_size = page_size
        self.num_pages = whole_pages(num_tokens, page_size)
        # A stack, low pages on top.
        self._free = np.arange(self.num_pages, 0, -1, dtype=np.int32)
        self._num_free = self.num_pages
        self._taken = np.zeros(self.num_pages + 1, np.bool_)

    @property
    def num_tokens(self) -> int:
        """Slots in all, free and taken."""
        return self.num_pages * self.page_size

    @property
    def available_tokens(self) -> int:
        """Slots in free pages."""
        return self._num_free * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that a request of ``num_tokens`` tokens takes."""
        return -(-num_tokens // self.page_size)

    def grow(self, old_len: int, new_len: int, last_slot: int = 0) -> np.ndarray:
        """Slots for the tokens ``old_len`` to ``new_len`` of a request.

        Args:
            old_len: tokens that hold slots already.
            new_len: tokens that shall; not below ``old_len``.
            last_slot: the slot of token ``old_len - 1``, whose page is filled up first.

        Returns:
            int32 ``[new_len - old_len]``.

        Raises:
            OutOfSlotsError: too few pages are free; nothing was taken.
        """
        if new_len < old_len:
            raise ValueError(f"a request of {old_len} tokens cannot grow to {new_len}")
        pages = self.pages_for(new_len) - self.pages_for(old_len)
        if pages > self._num_free:
            raise OutOfSlotsError(
                f"{new_len - old_len} more tokens take {pages} pages of {self.page_size}, "
                f"{self._num_free} of {self.num_pages} are free; raise --max-total-tokens"
            )
        fresh = self._take(pages)
        room = self.pages_for(old_len) * self.page_size - old_len
        rest = np.arange(last_slot + 1, last_slot + 1 + room, dtype=np.int32)
        offsets = np.arange(self.page_size, dtype=np.int32)
        paged = (fresh[:, None] * self.page_size + offsets).reshape(-1)
        return np.concatenate([rest, paged])[: new_len - old_len].astype(np.int32, copy=False)

    def grow_each(self, old_lens: np.ndarray, last_slots: np.ndarray) -> np.ndarray:
        """A slot for one more token of each of several requests; as ``grow`` of each.

        Args:
            old_lens: int32 ``[num_requests]``, the tokens of each.
            last_slots: int32 ``[num_requests]``, the slot of each one's last token.

        Returns:
            int32 ``[num_requests]``.
        """
        at_border = old_lens % self.page_size == 0
        pages = int(at_border.sum())
        if pages > self._num_free:
            raise OutOfSlotsError(
                f"{len(old_lens)} requests take {pages} pages of {self.page_size} for a token "
                f"each, {self._num_free} of {self.num_pages} are free; raise --max-total-tokens"
            )
        slots = last_slots + 1
        slots[at_border] = self._take(pages) * self.page_size
        return slots

    def _take(self, pages: int) -> np.ndarray:
        begin = self._num_free - pages
        fresh = self._free[begin : self._num_free][::-1]
        self._num_free = begin
        self._taken[fresh] = True
        return fresh

    def free(self, slots: np.ndarray) -> None:
        """Take back all ``slots`` of one request, int32 ``[length]`` in the order of its tokens.

        Raises:
            ValueError: a page of them is not taken (freed twice?); nothing was freed.
        """
        pages = slots[:: self.page_size] // self.page_size
        if len(np.unique(pages)) != len(pages) or not self._taken[pages].all():
            raise ValueError(
                "these slots are free already, or were never handed out: "
                f"pages {pages[~self._taken[pages]].tolist() or pages.tolist()}"
            )
        self._taken[pages] = False
        self._free[self._num_free : self._num_free + len(pages)] = pages[::-1]
        self._num_free += len(pages)
