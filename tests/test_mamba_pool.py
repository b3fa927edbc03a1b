"""A state is restored for exactly the tokens it was saved after, or not at all."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from breakgraph.memory import KVSpace, MambaPool, RequestTable, SlotAllocator
from breakgraph.memory.radix_cache import RadixNode

CPU = torch.device("cpu")


def layer(conv: tuple[int, int] = (1, 1), state: tuple[int, ...] = (1,)) -> Any:
    return SimpleNamespace(conv_shape=conv, state_shape=state)


def make_space(
    rows: int = 4, snapshots: int = 3, tokens: int = 64, page: int = 1
) -> tuple[KVSpace, MambaPool]:
    pool = MambaPool([layer()], rows, snapshots, torch.float32, CPU)
    return KVSpace(RequestTable(rows, 64, SlotAllocator(tokens, page)), states=pool), pool


def digest(ids: Sequence[int]) -> float:
    """A state: any order of any tokens has its own, exact in float32."""
    value = 0
    for token in ids:
        value = (31 * value + token + 1) % 65521
    return float(value)


def computed(space: KVSpace, pool: MambaPool, ids: Sequence[int]) -> tuple[int, int]:
    """A row that has computed ``ids``, and how many of them it found."""
    row, cached = space.acquire(ids[:-1])
    assert not cached or pool.state[row, 0] == digest(ids[:cached])
    space.extend(row, len(ids) - cached)
    pool.state[row, 0] = digest(ids)
    return row, cached


def leave(space: KVSpace, pool: MambaPool, ids: Sequence[int]) -> int:
    """Compute ``ids`` and let go of them; returns how many were found."""
    row, cached = computed(space, pool, ids)
    space.release(row, ids)
    return cached


def found(space: KVSpace, ids: Sequence[int]) -> int:
    row, cached = space.acquire(ids)
    space.release(row)
    return cached


def test_layers_see_their_part_of_every_slot_and_a_copy_takes_them_all():
    layers = [layer((3, 8), (2, 4, 5)), layer((2, 6), (7,))]
    pool = MambaPool(layers, 2, 3, torch.bfloat16, CPU)
    pool.bind(layers)
    assert pool.num_slots == 6 and pool.reserved_slot == 2 and list(pool.snapshots) == [3, 4, 5]
    assert MambaPool.bytes_per_slot(layers, torch.bfloat16) * 6 == sum(
        tensor.nbytes for tensor in pool.tensors()
    )
    for one in layers:
        assert one.conv_state.shape == (6, *one.conv_shape)
        assert one.state.shape == (6, *one.state_shape)
        assert one.conv_state.dtype == torch.bfloat16 and one.state.dtype == torch.float32
        assert one.state[0].is_contiguous() and one.conv_state[0].is_contiguous()
        assert not one.conv_state.any() and not one.state.any()
        one.conv_state[1].fill_(len(one.conv_state[0]))
        one.state[1].normal_()
    pool.copy(1, 4)
    for one in layers:
        torch.testing.assert_close(one.state[4], one.state[1])
        assert (one.conv_state[4] == len(one.conv_state[0])).all()
        assert not one.state[[0, 2, 3, 5]].any() and not one.conv_state[[0, 2, 3, 5]].any()


def test_a_pool_serves_only_the_layers_it_was_made_for():
    pool = MambaPool([layer()], 2, 0, torch.float32, CPU)
    with pytest.raises(ValueError, match="1 recurrent layers cannot serve these 2"):
        pool.bind([layer(), layer()])
    with pytest.raises(ValueError, match="shapes differ"):
        pool.bind([layer(state=(2,))])


def test_too_little_memory_names_the_flags(monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(RuntimeError, match="--max-mamba-cache-size or --max-running-requests"):
        MambaPool([layer()], 2, 3, torch.float32, CPU)


def test_a_match_is_as_long_as_the_deepest_saved_state():
    space, pool = make_space()
    leave(space, pool, [1, 2, 3, 4])
    assert found(space, [1, 2, 3]) == 0 and space.cached_prefix([1, 2, 3]) == 3
    assert found(space, [1, 2, 3, 4, 5]) == 4
    assert leave(space, pool, [1, 2, 3, 4, 5, 6]) == 4
    assert found(space, [1, 2, 3, 4, 5]) == 4 and found(space, [1, 2, 3, 4, 5, 6]) == 6
    row, cached = space.acquire([1, 2, 3, 9])
    assert (cached, space.branch(row)) == (0, 3)
    assert space.available_pages == 64  # what it cannot use is not its to hold
    space.release(row)
    assert space.acquire() == (row, 0) and space.branch(row) == 0
    space.release(row)


def test_the_state_of_a_failed_forward_is_not_kept():
    space, pool = make_space()
    row, _ = computed(space, pool, [1, 2, 3])
    space.release(row, [1, 2, 3], failed=True)
    assert space.cached_prefix([1, 2, 3]) == 3 and found(space, [1, 2, 3]) == 0


def test_a_state_inside_a_page_is_not_kept():
    space, pool = make_space(page=2)
    leave(space, pool, [1, 2, 3])
    assert space.cached_prefix([1, 2]) == 2 and found(space, [1, 2]) == 0
    leave(space, pool, [1, 2, 3, 4])
    assert found(space, [1, 2, 3, 4]) == 4


def test_a_row_goes_on_with_the_slots_of_who_was_first():
    space, pool = make_space()
    leave(space, pool, [1, 2, 3, 4])
    row, _ = space.acquire([1, 2, 3, 9])
    space.extend(row, 3)
    pool.state[row, 0] = digest([1, 2, 3])
    version = space.table.versions[row]
    space.share(row, [1, 2, 3])
    assert space.table.versions[row] > version and space.table.borrowed[row] == 3
    assert space.cache is not None and space.cache.cached_tokens == 4
    assert space.table.allocator.available_tokens == 60
    assert found(space, [1, 2, 3]) == 3
    space.extend(row, 1)
    pool.state[row, 0] = digest([1, 2, 3, 9])
    space.share(row, [1, 2, 3, 9])  # behind what another cached
    assert found(space, [1, 2, 3, 9]) == 4 and space.cache.cached_tokens == 5
    space.release(row, [1, 2, 3, 9])
    assert space.is_empty and space.cache.cached_tokens == 5


def test_the_least_recently_used_state_goes_and_what_others_begin_with_stays():
    space, pool = make_space(snapshots=3)
    for ids in ([1, 1], [2, 2], [3, 3]):
        leave(space, pool, ids)
    assert found(space, [1, 1]) == 2
    leave(space, pool, [4, 4])
    assert [found(space, [i, i]) for i in (1, 2, 3, 4)] == [2, 0, 2, 2]
    assert space.cached_prefix([2, 2]) == 2
    for tail in range(5, 15):
        assert leave(space, pool, [1, 1, tail]) == 2
    assert found(space, [1, 1]) == 2 and found(space, [1, 1, 14]) == 3
    together = [[1, 1, 20, tail] for tail in range(4)]
    rows = [computed(space, pool, ids)[0] for ids in together]
    for row, ids in zip(rows, together, strict=True):
        space.release(row, ids)
    assert found(space, [1, 1]) == 2 and found(space, together[0]) == 2


def test_eviction_and_flush_take_states_along():
    space, pool = make_space(tokens=8)
    leave(space, pool, [1, 2, 3, 4])
    leave(space, pool, [5, 6, 7, 8])
    states = space.states
    assert states is not None and states.num_saved == 2
    leave(space, pool, [9])  # cuts the end off the older one
    assert space.cached_prefix([1, 2, 3, 4]) == 3 and states.num_saved == 2
    assert found(space, [1, 2, 3, 4]) == 0 and found(space, [5, 6, 7, 8]) == 4
    row, _ = space.acquire([5, 6, 7, 8])
    space.flush()
    assert states.num_saved == 0 and states.is_sound
    assert found(space, [5, 6, 7, 8]) == 0 and space.cached_prefix([5, 6, 7, 8]) == 4
    space.release(row)
    space.flush()
    assert space.table.is_empty


def test_without_a_slot_to_save_in_nothing_is_cached():
    space, pool = make_space(snapshots=0)
    leave(space, pool, [1, 2, 3])
    assert space.cache is None and space.table.is_empty


class Space(RuleBasedStateMachine):
    """Random rows of prompts that begin alike: what each slot and each state holds is checked."""

    @initialize(
        page=st.sampled_from([1, 2, 3]), pages=st.integers(10, 30), snapshots=st.integers(1, 5)
    )
    def start(self, page: int, pages: int, snapshots: int) -> None:
        self.page = page
        self.space, self.pool = make_space(3, snapshots, page * pages, page)
        self.stored = np.full(page * (pages + 1), -1)
        self.rows: dict[int, list[int]] = {}

    @precondition(lambda self: len(self.rows) < 3)
    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def acquire(self, ids: list[int]) -> None:
        row, cached = self.space.acquire(ids)
        assert cached <= self.space.branch(row) <= len(ids)
        assert self.space.cached_prefix(ids[:cached]) == cached
        if cached:
            assert self.pool.state[row, 0] == digest(ids[:cached])
        else:
            self.pool.state[row, 0] = 0  # as a forward without a prefix does
        self.rows[row] = ids[:cached]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def compute(self, data: st.DataObject, new: list[int]) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        pages = self.space.table.pages_to_extend(row, len(new))
        if pages > self.space.available_pages or len(self.rows[row]) + len(new) > 64:
            return
        self.stored[self.space.extend(row, len(new))] = new
        self.rows[row] = [*self.rows[row], *new]
        self.pool.state[row, 0] = digest(self.rows[row])
        if data.draw(st.booleans()):
            self.space.share(row, self.rows[row])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), keep=st.booleans(), failed=st.booleans())
    def release(self, data: st.DataObject, keep: bool, failed: bool) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        ids = self.rows.pop(row)
        if failed:
            self.pool.state[row, 0] = -1
        self.space.release(row, ids if keep else (), failed=failed)

    @rule()
    def flush(self) -> None:
        self.space.flush()
        assert not self.saved()

    def saved(self) -> list[tuple[RadixNode, list[int]]]:
        assert self.space.cache is not None
        return [(node, ids) for node, ids in walk(self.space.cache.root, []) if node.state]

    @invariant()
    def every_slot_and_state_holds_what_it_should(self) -> None:
        if not hasattr(self, "rows"):
            return
        space, table = self.space, self.space.table
        cache, states = space.cache, space.states
        assert cache is not None and states is not None and states.is_sound
        owned, pages = [], 0
        for row, ids in self.rows.items():
            slots = table.slots(row)
            assert self.stored[slots].tolist() == ids
            owned += slots[table.borrowed[row] :].tolist()
            pages += -(-len(ids) // self.page) - table.borrowed[row] // self.page
        for node, ids in walk(cache.root, []):
            assert self.stored[node.slots].tolist() == ids[len(ids) - len(node.slots) :]
            assert node.end == len(ids)
            owned += node.slots.tolist()
        assert len(set(owned)) == len(owned)
        taken = table.allocator.num_tokens - table.allocator.available_tokens
        assert taken == cache.cached_tokens + pages * self.page
        assert states.num_saved == len(self.saved())
        for node, ids in self.saved():
            assert self.pool.state[node.state, 0] == digest(ids)

    def teardown(self) -> None:
        if not hasattr(self, "rows"):
            return
        for row in self.rows:
            self.space.release(row)
        assert self.space.is_empty
        self.space.flush()
        assert self.space.table.is_empty


def walk(node: RadixNode, ids: list[int]) -> Iterator[tuple[RadixNode, list[int]]]:
    """Each node below, with all the tokens that end there."""
    for child in node.children.values():
        through = [*ids, *child.tokens.tolist()]
        yield child, through
        yield from walk(child, through)


TestSpace = Space.TestCase
TestSpace.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
