"""Which cached tokens can be used again: a radix tree over pages of token ids.

A slot in the tree belongs to the tree until it is evicted, and a locked node's path to the root is
never evicted. So whoever has locked a match may read its slots, and every other cached slot can be
had back at any time: eviction takes the least recently used leaves, from their ends.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from breakgraph.memory.slot_allocator import SlotAllocator
from breakgraph.memory.state_cache import StateCache

IntArray = np.ndarray


@dataclass(eq=False, slots=True)
class RadixNode:
    """An edge of the tree and the node at its end.

    Attributes:
        tokens: int32, whole pages of token ids; empty at the root alone.
        slots: int32, as long as ``tokens``.
        children: by the bytes of their first page of ids.
        locks: how many use this node or one below it.
        last_used: the tick of its last unlock.
        state: the slot of the recurrent state after the node's last token; None where none is
            saved.
    """

    tokens: IntArray
    slots: IntArray
    parent: RadixNode | None = None
    children: dict[bytes, RadixNode] = field(default_factory=dict)
    locks: int = 0
    last_used: int = 0
    state: int | None = None

    @property
    def end(self) -> int:
        """Tokens from the root to the node's end."""
        length, above = len(self.tokens), self.parent
        while above is not None:
            length, above = length + len(above.tokens), above.parent
        return length


class RadixCache:
    """Prefixes of finished requests, by their tokens.

    Attributes:
        cached_tokens: tokens in the tree.
        evictable_tokens: those of them that nobody has locked.
        states: recurrent states at nodes, which go when their node's end goes; None where the
            model keeps none.
    """

    def __init__(self, allocator: SlotAllocator, states: StateCache | None = None) -> None:
        self.states = states
        self._allocator = allocator
        self._page = allocator.page_size
        nothing = np.zeros(0, np.int32)
        self.root = RadixNode(nothing, nothing, locks=1)
        self.cached_tokens = self.evictable_tokens = 0
        self._leaves: list[tuple[int, int, RadixNode]] = []  # a heap; entries may be out of date
        self._ticks = itertools.count(1)
        self._heap_limit = 64

    def match(self, ids: Sequence[int] | IntArray) -> tuple[RadixNode, IntArray]:
        """The node that ends the longest cached prefix of ``ids``, and the prefix's slots.

        Lock the node before anything else is done with the cache.
        """
        tokens = np.asarray(ids, np.int32)
        node, parts = self.root, [self.root.slots]
        while child := node.children.get(self._key(tokens)):
            common = self._common(child.tokens, tokens)
            node = child if common == len(child.tokens) else self._split(child, common)
            parts.append(node.slots)
            tokens = tokens[common:]
        return node, np.concatenate(parts)

    def insert(self, ids: Sequence[int] | IntArray, slots: IntArray) -> tuple[RadixNode, int]:
        """Cache ``ids``, whole pages of them, in ``slots``.

        Returns:
            The node that ends ``ids``, and how many leading tokens were cached already: their
            ``slots`` stay the caller's, the others are the tree's from now on.

        Raises:
            ValueError: ``ids`` end inside a page, or ``slots`` are not as many.
        """
        tokens = np.asarray(ids, np.int32)
        if len(tokens) % self._page or len(tokens) != len(slots):
            raise ValueError(
                f"{len(tokens)} tokens in {len(slots)} slots are no whole pages of {self._page}"
            )
        node, found = self.match(tokens)
        known = len(found)
        if known < len(tokens):
            leaf = RadixNode(tokens[known:].copy(), slots[known:].copy(), node)
            node.children[self._key(leaf.tokens)] = leaf
            self.cached_tokens += len(leaf.tokens)
            self.evictable_tokens += len(leaf.tokens)
            node = leaf
            self._touch(node)
        return node, known

    def lock(self, node: RadixNode) -> None:
        """Keep ``node`` and all above it from eviction until as many calls of ``unlock``."""
        for above in self._path(node):
            if above.locks == 0:
                self.evictable_tokens -= len(above.tokens)
            above.locks += 1

    def unlock(self, node: RadixNode) -> None:
        """Undo one ``lock`` of ``node``."""
        for above in self._path(node):
            above.locks -= 1
            if above.locks == 0:
                self.evictable_tokens += len(above.tokens)
                self._touch(above)

    def evict(self, num_tokens: int) -> int:
        """Free at least ``num_tokens`` slots, or all that can be; returns how many."""
        freed, parts = 0, []
        while freed < num_tokens and self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            if not self._evictable(node, used):
                continue
            if self.states is not None:
                self.states.drop(node)
            wanted = -(-(num_tokens - freed) // self._page) * self._page
            keep = max(len(node.tokens) - wanted, 0)
            parts.append(node.slots[keep:])
            cut = len(node.tokens) - keep
            freed += cut
            self.cached_tokens -= cut
            self.evictable_tokens -= cut
            if keep:
                node.tokens, node.slots = node.tokens[:keep], node.slots[:keep]
                self._push(node)
            else:
                self._remove(node)
        if parts:
            self._allocator.free(*parts)
        return freed

    def _remove(self, leaf: RadixNode) -> None:
        parent, leaf.parent = leaf.parent, None
        if parent is not None:
            del parent.children[self._key(leaf.tokens)]
            self._push(parent)

    def _split(self, node: RadixNode, count: int) -> RadixNode:
        """Put a node between ``node`` and its parent, with the first ``count`` tokens."""
        parent = node.parent
        upper = RadixNode(
            node.tokens[:count], node.slots[:count], parent, {}, node.locks, node.last_used
        )
        if parent is not None:
            parent.children[self._key(upper.tokens)] = upper
        node.parent, node.tokens, node.slots = upper, node.tokens[count:], node.slots[count:]
        upper.children[self._key(node.tokens)] = node
        return upper

    def _touch(self, node: RadixNode) -> None:
        node.last_used = next(self._ticks)
        self._push(node)

    def _push(self, node: RadixNode) -> None:
        if not self._evictable(node, node.last_used):
            return
        heapq.heappush(self._leaves, (node.last_used, next(self._ticks), node))
        if len(self._leaves) > self._heap_limit:
            self._leaves = [e for e in self._leaves if self._evictable(e[2], e[0])]
            heapq.heapify(self._leaves)
            self._heap_limit = 2 * len(self._leaves) + 64

    @staticmethod
    def _evictable(node: RadixNode, used: int) -> bool:
        """Whether a heap entry of ``node``, made when it was last ``used``, is good still."""
        attached = node.parent is not None
        return attached and not node.locks and not node.children and used == node.last_used

    def _key(self, tokens: IntArray) -> bytes:
        return tokens[: self._page].tobytes()

    def _common(self, a: IntArray, b: IntArray) -> int:
        """Tokens in the common prefix of ``a`` and ``b``, in whole pages."""
        length = min(len(a), len(b))
        differ = np.flatnonzero(a[:length] != b[:length])
        return (int(differ[0]) if len(differ) else length) // self._page * self._page

    @staticmethod
    def _path(node: RadixNode) -> Iterator[RadixNode]:
        """``node`` and those above it, the root left out."""
        while node.parent is not None:
            yield node
            node = node.parent
