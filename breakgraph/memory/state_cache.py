"""Recurrent states at the ends of cached prefixes.

A state is good for exactly the tokens that end at its node of the radix tree: for one token more
or less there is nothing to be had from it. So a node that is cut short or removed loses its state,
while one that is split keeps it at the lower end, where its tokens still end. Saving and restoring
copy in stream order, so a state may be dropped at any time, one of a locked node too.

The least recently used state makes room. The use of a state is a use of all on its path, so of
two states on one path the longer goes first: what many prompts begin with outlasts their ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from breakgraph.memory.radix_cache import RadixNode
    from breakgraph.memory.rank_memory import StateSlots


class StateCache:
    """Which node's state lies in which of the pool's snapshot slots."""

    def __init__(self, pool: StateSlots) -> None:
        self._pool = pool
        self._free = list(reversed(pool.snapshots))
        self._nodes: dict[int, RadixNode] = {}  # by slot, the least recently used first

    @property
    def num_saved(self) -> int:
        return len(self._nodes)

    @property
    def is_sound(self) -> bool:
        """True when each slot is free or of a node in the tree: otherwise there is a leak."""
        return sorted([*self._free, *self._nodes]) == list(self._pool.snapshots) and all(
            node.state == slot and node.parent is not None for slot, node in self._nodes.items()
        )

    def deepest(self, node: RadixNode) -> RadixNode:
        """The deepest node with a state on the path to ``node``; the root where there is none."""
        while node.state is None and node.parent is not None:
            node = node.parent
        return node

    def save(self, node: RadixNode, row: int) -> None:
        """Keep the state of ``row``, which has computed just the tokens that end at ``node``."""
        if node.state is None:
            if not self._free:
                self.drop(next(iter(self._nodes.values())))
            node.state = self._free.pop()
            self._pool.copy(row, node.state)
        self._touch(node)

    def restore(self, node: RadixNode, row: int) -> None:
        """Let ``row`` go on from the state of ``node``; from zeros, if that is the root."""
        if node.state is not None:
            self._pool.copy(node.state, row)
            self._touch(node)

    def drop(self, node: RadixNode) -> None:
        """Forget the state of ``node``, if it has one."""
        if node.state is not None:
            del self._nodes[node.state]
            self._free.append(node.state)
            node.state = None

    def clear(self) -> None:
        """Forget every state."""
        for node in list(self._nodes.values()):
            self.drop(node)

    def _touch(self, node: RadixNode) -> None:
        above: RadixNode | None = node
        while above is not None:
            if above.state is not None:
                self._nodes.pop(above.state, None)
                self._nodes[above.state] = above
            above = above.parent
