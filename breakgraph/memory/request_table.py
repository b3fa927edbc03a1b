"""Which slots each running request holds.

A slot is in at most one row, and a row that is released gives back every slot it held: when no
request runs, the pool is empty.
"""

from __future__ import annotations

import numpy as np

from breakgraph.memory.slot_allocator import SlotAllocator


class RequestTable:
    """A row per running request: the KV slot of each of its tokens, in order.

    Attributes:
        allocator: where slots come from and go back to.
        table: int32 ``[max_running_requests, context_length]``.
        lengths: int32 ``[max_running_requests]``, how much of each row is used.
    """

    def __init__(
        self, max_running_requests: int, context_length: int, allocator: SlotAllocator
    ) -> None:
        if max_running_requests < 1:
            raise ValueError(f"--max-running-requests is {max_running_requests}; it must be >= 1")
        self.allocator = allocator
        self.table = np.zeros((max_running_requests, context_length), np.int32)
        self.lengths = np.zeros(max_running_requests, np.int32)
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

    def acquire(self) -> int:
        """A row that holds no slots yet. Raises RuntimeError when all rows are held."""
        if not self._free:
            raise RuntimeError(
                f"all {len(self.table)} requests that may run at once are running; raise "
                "--max-running-requests"
            )
        row = self._free.pop()
        self._held[row] = True
        return row

    def extend(self, row: int, count: int) -> np.ndarray:
        """Give ``row`` slots for ``count`` more tokens; returns them, int32 ``[count]``.

        Raises:
            ValueError: the row is not held, or would outgrow the context length.
            OutOfSlotsError: the pool has too few; the row stays as it was.
        """
        self._check(row)
        old = int(self.lengths[row])
        new, context = old + count, self.table.shape[1]
        if new > context:
            raise ValueError(
                f"a request of {new} tokens is longer than the context of {context} tokens"
            )
        last = int(self.table[row, old - 1]) if old else 0
        slots = self.allocator.grow(old, new, last)
        self.table[row, old:new] = slots
        self.lengths[row] = new
        return slots

    def slots(self, row: int) -> np.ndarray:
        """The row's slots, int32 ``[length]``: a view, good until the row is released."""
        self._check(row)
        return self.table[row, : self.lengths[row]]

    def release(self, row: int) -> None:
        """Give back the row and every slot that it holds. Raises ValueError if it is not held."""
        self.allocator.free(self.slots(row))
        self.lengths[row] = 0
        self._held[row] = False
        self._free.append(row)

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self._held) or not self._held[row]:
            raise ValueError(f"row {row} is not held by any request")
