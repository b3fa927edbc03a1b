"""What rank 0 knows of the memory of each rank, where ranks hold different requests.

Slots, rows and saved states are all given out here, by accounts alike for every rank; the keys,
values and states themselves lie on the rank, which is told of them with its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from breakgraph.memory.request_table import RequestTable
from breakgraph.memory.slot_allocator import SlotAllocator


class StateSlots(Protocol):
    """Slots of recurrent states; see ``MambaPool``."""

    on_copy: Callable[[int, int], object] | None

    @property
    def snapshots(self) -> Sequence[int]: ...

    def copy(self, from_slot: int, to_slot: int) -> None: ...


class RemoteStates:
    """The slots of another rank, whose states that rank copies: ``on_copy`` must tell it."""

    on_copy: Callable[[int, int], object] | None = None

    def __init__(self, snapshots: Sequence[int]) -> None:
        self.snapshots = snapshots

    def copy(self, from_slot: int, to_slot: int) -> None:
        """Have a slot copied before the rank's next forward."""
        if self.on_copy is None:
            raise RuntimeError("the states of another rank are copied, and nobody tells it: a bug")
        self.on_copy(from_slot, to_slot)


class RankMemory(NamedTuple):
    """The account of one rank.

    Attributes:
        table: its rows, and the slots of its pool.
        states: of its recurrent mixers; None where the model has none.
    """

    table: RequestTable
    states: StateSlots | None = None

    def like(self) -> RankMemory:
        """An empty one of another rank's memory of the same size."""
        allocator, states = self.table.allocator, self.states
        slots = SlotAllocator(allocator.num_tokens, allocator.page_size)
        table = RequestTable(*self.table.table.shape, slots)
        return RankMemory(table, None if states is None else RemoteStates(states.snapshots))
