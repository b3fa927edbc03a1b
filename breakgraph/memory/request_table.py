"""Which slots each running request holds.

A slot is owned by one row at most. A row may begin with slots it does not own (a cached prefix);
released, it gives back those it owns and no others, so that with no request and no cached prefix
the pool is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from breakgraph.memory.slot_allocator import SlotAllocator


class RequestTable:
    """A row per running request: the KV slot of each of its tokens, in order.

    Attributes:
        allocator: where slots come from and go back to.
        table: int32 ``[max_running_requests, context_length]``.
        lengths: int32 ``[max_running_requests]``, how much of each row is used.
        borrowed: int32 ``[max_running_requests]``, leading slots that the row does not own.
        versions: int64 ``[max_running_requests]``, rises when a row is taken and when its slots
            are changed: a copy of a row is good while its version is the same and the row only
            grows.
    """

    def __init__(
        self, max_running_requests: int, context_length: int, allocator: SlotAllocator
    ) -> None:
        if max_running_requests < 1:
            raise ValueError(f"--max-running-requests is {max_running_requests}; it must be >= 1")
        self.allocator = allocator
        self.table = np.zeros((max_running_requests, context_length), np.int32)
        self.lengths = np.zeros(max_running_requests, np.int32)
        self.borrowed = np.zeros(max_running_requests, np.int32)
        self.versions = np.zeros(max_running_requests, np.int64)
        self._free = list(range(max_running_requests - 1, -1, -1))
        self._held = [False] * max_running_requests

    @property
    def available_rows(self) -> int:
        return len(self._free)

    @property
    def is_empty(self) -> bool:
        """True when no row is held and no slot is taken."""
        return (
            self.available_rows == len(self.table)
            and self.allocator.available_tokens == self.allocator.num_tokens
        )

    def acquire(self, prefix: np.ndarray | None = None) -> int:
        """A row that begins with the slots of ``prefix``, which stay their owner's.

        Args:
            prefix: int32, whole pages; None for an empty row.

        Raises:
            RuntimeError: all rows are held.
            ValueError: ``prefix`` ends inside a page, or is longer than the context.
        """
        count = 0 if prefix is None else len(prefix)
        if count and (count % self.allocator.page_size or count > self.table.shape[1]):
            raise ValueError(
                f"a prefix of {count} slots is no whole number of pages of "
                f"{self.allocator.page_size}, or more than the context of {self.table.shape[1]}"
            )
        if not self._free:
            raise RuntimeError(
                f"all {len(self.table)} requests that may run at once are running; raise "
                "--max-running-requests"
            )
        row = self._free.pop()
        self._held[row] = True
        if prefix is not None and count:
            self.table[row, :count] = prefix
            self.lengths[row] = self.borrowed[row] = count
        self.versions[row] += 1
        return row

    def pages_to_extend(self, row: int, count: int) -> int:
        """Free pages that ``extend(row, count)`` would take."""
        self._check(row)
        length, pages_for = int(self.lengths[row]), self.allocator.pages_for
        return pages_for(length + count) - pages_for(length)

    def extend(self, row: int, count: int) -> np.ndarray:
        """Give ``row`` slots for ``count`` more tokens; as ``extend_each`` of one.

        Raises:
            ValueError: the row is not held too.
        """
        self._check(row)
        return self.extend_each(np.array([row]), np.array([count]))

    def extend_each(self, rows: np.ndarray, counts: np.ndarray | int = 1) -> np.ndarray:
        """Give each of ``rows``, all held and different, slots for ``counts`` more tokens.

        Returns:
            int32 ``[sum(counts)]``, row after row.

        Raises:
            ValueError: a row would outgrow the context length.
            OutOfSlotsError: the pool has too few; the rows stay as they were.
        """
        old = self.lengths[rows]
        new, context = old + counts, self.table.shape[1]
        if (longest := int(new.max())) > context:
            raise ValueError(
                f"a request of {longest} tokens is longer than the context of {context} tokens"
            )
        slots = self.allocator.grow_each(old, new, self.table[rows, old - 1])
        self.table.reshape(-1)[self._places(rows, old, new)] = slots
        self.lengths[rows] = new
        return slots

    def slots_of(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The slots of the tokens ``begins`` to ``ends`` of each of ``rows``, one after the other.

        Returns:
            int32 ``[sum(ends - begins)]``, row after row.
        """
        return self.table.reshape(-1).take(self._places(rows, begins, ends))

    def _places(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Where the same tokens are in the table laid flat: 64 rows in half the time of slices."""
        counts = ends - begins
        before = np.add.accumulate(counts, dtype=np.int64)
        total = int(before[-1]) if len(counts) else 0
        first = rows * self.table.shape[1] + begins - (before - counts)
        return first.repeat(counts) + np.arange(total)

    def slots(self, row: int) -> np.ndarray:
        """The row's slots, int32 ``[length]``: a view, good until the row is released."""
        self._check(row)
        return self.table[row, : self.lengths[row]]

    def disown(self, row: int, slots: np.ndarray, known: int) -> None:
        """Go on with ``slots``, another's from now on, in place of as many of the row's first.

        Args:
            row: a held row.
            slots: int32, whole pages.
            known: how many of them, whole pages, were another's before: what the row owns in
                their place is given back.
        """
        begin = int(self.borrowed[row])
        if known > begin:
            self.allocator.free(self.slots(row)[begin:known])
            self.versions[row] += 1
        self.table[row, : len(slots)] = slots
        self.borrowed[row] = len(slots)

    def release(self, row: int, kept: tuple[int, int] = (0, 0)) -> None:
        """As ``release_each``, of one row."""
        self.release_each([row], [kept])

    def release_each(self, rows: Sequence[int], kept: Sequence[tuple[int, int]]) -> None:
        """Give back rows and the slots that they own, but those of the tokens in ``kept``.

        Args:
            rows: held ones, all different.
            kept: of each, begin and end, whole pages, of the tokens whose slots have another owner
                now.

        Raises:
            ValueError: a row is not held.
        """
        for row in rows:
            self._check(row)
        parts = []
        owned, lengths = self.borrowed[rows].tolist(), self.lengths[rows].tolist()
        for row, own, length, (begin, end) in zip(rows, owned, lengths, kept, strict=True):
            if own < begin:
                parts.append(self.table[row, own:begin])
            parts.append(self.table[row, max(own, end) : length])
        self.allocator.free(*parts)
        self.lengths[rows] = self.borrowed[rows] = 0
        for row in rows:
            self._held[row] = False
        self._free += rows

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self._held) or not self._held[row]:
            raise ValueError(f"row {row} is not held by any request")
