"""Which slots of the KV pool are free.

Slots are handed out by whole pages: token ``i`` of a request lies in its page
``i // page_size`` at offset ``i % page_size``, so a page never serves two requests, and page 0,
where padded rows store, serves none.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from breakgraph.memory.kv_pool import whole_pages

Tokens = TypeVar("Tokens", int, np.ndarray)


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

    def pages_for(self, num_tokens: Tokens) -> Tokens:
        """Pages that a request of ``num_tokens`` tokens takes."""
        return -(-num_tokens // self.page_size)

    def pages_to_grow(self, old_lens: np.ndarray, new_lens: np.ndarray) -> int:
        """Free pages that several requests take to grow, all together."""
        if self.page_size > 1:
            old_lens, new_lens = self.pages_for(old_lens), self.pages_for(new_lens)
        return int((new_lens - old_lens).sum())

    def grow(self, old_len: int, new_len: int, last_slot: int = 0) -> np.ndarray:
        """As ``grow_each``, of one request."""
        return self.grow_each(*(np.array([each]) for each in (old_len, new_len, last_slot)))

    def grow_each(
        self, old_lens: np.ndarray, new_lens: np.ndarray, last_slots: np.ndarray
    ) -> np.ndarray:
        """Slots for the tokens ``old_lens`` to ``new_lens`` of several requests.

        Args:
            old_lens: int ``[num_requests]``, the tokens of each that hold slots already.
            new_lens: int ``[num_requests]``, the tokens of each that shall; not fewer.
            last_slots: int ``[num_requests]``, the slot of each one's last token, whose page is
                filled up first; any number where there is none.

        Returns:
            int32 ``[sum(new_lens - old_lens)]``, request after request.

        Raises:
            OutOfSlotsError: too few pages are free; nothing was taken.
        """
        if (new_lens < old_lens).any():
            raise ValueError(f"requests of {old_lens} tokens cannot grow to {new_lens}")
        total = self.pages_to_grow(old_lens, new_lens)
        if total > self._num_free:
            raise OutOfSlotsError(
                f"{int((new_lens - old_lens).sum())} more tokens take {total} pages of "
                f"{self.page_size}, {self._num_free} of {self.num_pages} are free; raise "
                "--max-total-tokens"
            )
        fresh = self._take(total)
        if self.page_size == 1:
            return fresh
        begun, held = self.pages_for(old_lens), self.pages_for(new_lens)
        request, token = new_tokens(old_lens, new_lens)
        # The tokens' pages, counted from the first fresh one of each request.
        page = token // self.page_size - begun[request]
        nth = page + (np.cumsum(held - begun) - held + begun)[request]
        last = (last_slots // self.page_size)[request]
        page = np.where(page < 0, last, np.append(fresh, 0)[nth])
        return (page * self.page_size + token % self.page_size).astype(np.int32)

    def _take(self, pages: int) -> np.ndarray:
        begin = self._num_free - pages
        fresh = self._free[begin : self._num_free][::-1].copy()
        self._num_free = begin
        self._taken[fresh] = True
        return fresh

    def free(self, *slots: np.ndarray) -> None:
        """Take back slots: of each request whole pages, int32 in the order of its tokens.

        Raises:
            ValueError: a page of them is not taken (freed twice?); nothing was freed.
        """
        pages = np.concatenate([part[:: self.page_size] for part in slots]) // self.page_size
        ordered = np.sort(pages)
        if (ordered[1:] == ordered[:-1]).any() or not self._taken[pages].all():
            raise ValueError(
                "these slots are free already, or were never handed out: "
                f"pages {pages[~self._taken[pages]].tolist() or pages.tolist()}"
            )
        self._taken[pages] = False
        self._free[self._num_free : self._num_free + len(pages)] = pages[::-1]
        self._num_free += len(pages)


def new_tokens(old_lens: np.ndarray, new_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of requests that grow, each new token's request and its place in it, packed.

    Args:
        old_lens: int ``[num_requests]``.
        new_lens: int ``[num_requests]``, not below ``old_lens``.

    Returns:
        Two int64 arrays ``[sum(new_lens - old_lens)]``.
    """
    counts = new_lens - old_lens
    request = np.arange(len(counts)).repeat(counts)
    return request, np.arange(len(request)) - (np.cumsum(counts) - new_lens).repeat(counts)
