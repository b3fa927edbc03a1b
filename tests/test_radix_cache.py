"""The tree against a set of prefixes: what it says is cached is, and what it frees was not used."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from breakgraph.memory import KVSpace, OutOfSlotsError, RadixCache, RequestTable, SlotAllocator

TOKENS = st.lists(st.integers(0, 2), max_size=14)


class Tree(RuleBasedStateMachine):
    """Random use of a tree, next to a dict from each cached prefix to the slots of its end."""

    @initialize(page=st.sampled_from([1, 2, 3]), pages=st.integers(6, 30))
    def start(self, page: int, pages: int) -> None:
        self.page = page
        self.allocator = SlotAllocator(page * pages, page)
        self.cache = RadixCache(self.allocator)
        self.model: dict[tuple[int, ...], list[int]] = {}
        self.locked: list[tuple] = []

    def prefixes(self, ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[:end]) for end in range(self.page, len(ids) + 1, self.page)]

    def expected(self, ids: list[int]) -> list[int]:
        slots: list[int] = []
        for prefix in self.prefixes(ids):
            if prefix not in self.model:
                break
            slots += self.model[prefix]
        return slots

    @rule(ids=TOKENS)
    def insert(self, ids: list[int]) -> None:
        ids = ids[: len(ids) // self.page * self.page]
        if len(ids) > self.allocator.available_tokens:
            return
        slots, known = self.allocator.grow(0, len(ids)), len(self.expected(ids))
        node, found = self.cache.insert(ids, slots)
        assert found == known
        self.allocator.free(slots[:known])
        for prefix in self.prefixes(ids)[known // self.page :]:
            self.model[prefix] = slots[len(prefix) - self.page : len(prefix)].tolist()
        assert self.cache.match(ids)[0] is node

    @rule(ids=TOKENS, lock=st.booleans())
    def match(self, ids: list[int], lock: bool) -> None:
        node, slots = self.cache.match(ids)
        assert slots.tolist() == self.expected(ids)
        if lock:
            self.cache.lock(node)
            self.locked.append((node, ids[: len(slots)], slots.tolist()))

    @rule(which=st.integers(0, 9))
    def unlock(self, which: int) -> None:
        if self.locked:
            self.cache.unlock(self.locked.pop(which % len(self.locked))[0])

    @rule(count=st.integers(0, 20))
    def evict(self, count: int) -> None:
        before, evictable = self.allocator.available_tokens, self.cache.evictable_tokens
        freed = self.cache.evict(count)
        assert freed == self.allocator.available_tokens - before
        assert min(count, evictable) <= freed < min(count, evictable) + self.page or freed == 0
        assert freed >= min(count, evictable)
        gone = [p for p in self.model if len(self.cache.match(p)[1]) < len(p)]
        assert len(gone) * self.page == freed
        for prefix in gone:
            del self.model[prefix]

    @invariant()
    def counts_agree_and_locked_prefixes_stay(self) -> None:
        if not hasattr(self, "model"):
            return
        cached = len(self.model) * self.page
        assert self.cache.cached_tokens == cached
        assert self.allocator.num_tokens - self.allocator.available_tokens == cached
        kept = {p for _, ids, _ in self.locked for p in self.prefixes(ids)}
        assert self.cache.evictable_tokens == cached - len(kept) * self.page
        for _, ids, slots in self.locked:
            assert self.cache.match(ids)[1].tolist() == slots

    def teardown(self) -> None:
        for node, *_ in getattr(self, "locked", []):
            self.cache.unlock(node)
        if hasattr(self, "cache"):
            self.cache.evict(self.cache.evictable_tokens)
            assert self.allocator.available_tokens == self.allocator.num_tokens
            assert not self.cache.root.children


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def filled(*prompts: list[int], page: int = 1) -> RadixCache:
    allocator = SlotAllocator(64, page)
    cache = RadixCache(allocator)
    for ids in prompts:
        slots = allocator.grow(0, len(ids))
        _, known = cache.insert(ids, slots)
        allocator.free(slots[:known])
    return cache


def cached(cache: RadixCache, ids: list[int]) -> int:
    return len(cache.match(ids)[1])


def test_the_least_recently_used_goes_first_from_its_end():
    cache = filled([1, 2, 3, 4], [1, 2, 8, 9], [5, 6, 7])
    node, _ = cache.match([1, 2, 3, 4])
    cache.lock(node)
    cache.unlock(node)
    assert cache.evict(1) == 1
    assert [cached(cache, p) for p in ([1, 2, 8, 9], [5, 6, 7], [1, 2, 3, 4])] == [3, 3, 4]
    assert cache.evict(4) == 4
    assert [cached(cache, p) for p in ([1, 2, 8, 9], [5, 6, 7], [1, 2, 3, 4])] == [2, 0, 4]


def test_a_page_is_shared_whole_or_not_at_all():
    cache = filled([1, 2, 3, 4, 5, 6, 7, 8], page=4)
    assert cached(cache, [1, 2, 3, 4, 5, 6, 7]) == 4
    assert cached(cache, [1, 2, 3, 9, 5, 6, 7, 8]) == 0
    assert cache.evict(1) == 4 and cached(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == 4
    with pytest.raises(ValueError, match="no whole pages of 4"):
        cache.insert([1, 2, 3], np.zeros(3, np.int32))


def test_the_heap_does_not_grow_with_use():
    cache = filled(*[[i, i] for i in range(20)])
    for turn in range(5000):
        node, _ = cache.match([turn % 20] * 2)
        cache.lock(node)
        cache.unlock(node)
    assert len(cache._leaves) < 200
    assert cache.evict(1000) == 40 and cache.cached_tokens == 0


def test_two_rows_that_computed_the_same_keep_one_copy():
    space = KVSpace(RequestTable(3, 32, SlotAllocator(32, 2)))
    ids = [1, 2, 3, 4, 5]
    rows = [space.acquire(ids)[0] for _ in range(2)]
    for row in rows:
        space.extend(row, 5)
    space.share(rows[0], ids)
    space.share(rows[1], ids)
    space.release(rows[0], ids)
    space.release(rows[1], ids)
    assert space.is_empty and space.cache is not None
    assert space.cache.cached_tokens == 4 == 32 - space.table.allocator.available_tokens
    row, found = space.acquire(ids)
    assert found == 4 and space.available_pages == 14 and not space.is_empty
    space.release(row)
    space.flush()
    assert space.table.is_empty


def test_extending_evicts_what_it_needs_and_no_more():
    space = KVSpace(RequestTable(3, 32, SlotAllocator(12)))
    row, _ = space.acquire([1])
    space.extend(row, 8)
    space.release(row, range(8))
    row, _ = space.acquire([20])
    space.extend(row, 6)
    assert space.cached_prefix(range(8)) == 6
    assert space.table.pages_to_extend(row, 7) > space.available_pages
    with pytest.raises(OutOfSlotsError):
        space.extend(row, 7)
    assert space.cached_prefix(range(8)) == 6
    space.release(row)


def test_a_borrowed_prefix_is_not_given_back_and_versions_count_requests():
    table = RequestTable(1, 8, SlotAllocator(8, 2))
    owner = table.allocator.grow(0, 4)
    assert table.versions.tolist() == [0]
    row = table.acquire(owner)
    table.extend(row, 3)
    table.release(row)
    assert table.allocator.available_tokens == 4 and table.versions.tolist() == [1]
    with pytest.raises(ValueError, match="no whole number of pages"):
        table.acquire(owner[:1])
    assert table.acquire() == row and table.versions.tolist() == [2]
    table.release(row)
