"""No slot has two owners, page 0 has none, and what is released is all there again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from breakgraph.memory import KVPool, OutOfSlotsError, RequestTable, SlotAllocator

CONTEXT = 24


class Table(RuleBasedStateMachine):
    """Random acquire, extend and release against a model that is a dict of lists."""

    rows = Bundle("rows")

    @initialize(
        page_size=st.sampled_from([1, 3, 4]), tokens=st.integers(4, 40), rows=st.integers(1, 5)
    )
    def start(self, page_size: int, tokens: int, rows: int) -> None:
        self.page_size = page_size
        self.allocator = SlotAllocator(tokens, page_size)
        self.table = RequestTable(rows, CONTEXT, self.allocator)
        self.max_rows = rows
        self.held: dict[int, list[int]] = {}

    @rule(target=rows)
    def acquire(self):
        if len(self.held) == self.max_rows:
            with pytest.raises(RuntimeError, match="--max-running-requests"):
                self.table.acquire()
            return -1
        row = self.table.acquire()
        assert row not in self.held
        self.held[row] = []
        return row

    @rule(row=rows, count=st.integers(0, 12))
    def extend(self, row: int, count: int) -> None:
        if row not in self.held:
            with pytest.raises(ValueError, match="not held"):
                self.table.extend(row, count)
            return
        before = self.allocator.available_tokens
        length = len(self.held[row])
        pages = -(-(length + count) // self.page_size) - -(-length // self.page_size)
        if length + count > CONTEXT:
            with pytest.raises(ValueError, match="context"):
                self.table.extend(row, count)
        elif pages * self.page_size > before:
            with pytest.raises(OutOfSlotsError, match="--max-total-tokens"):
                self.table.extend(row, count)
        else:
            slots = self.table.extend(row, count)
            assert slots.dtype == np.int32 and len(slots) == count
            self.held[row] += slots.tolist()
            before -= pages * self.page_size
        assert self.allocator.available_tokens == before

    @rule()
    def extend_each(self) -> None:
        rows = [row for row, slots in self.held.items() if slots]
        if not rows:
            return
        at_border = sum(len(self.held[row]) % self.page_size == 0 for row in rows)
        wanted = np.array(rows)
        if max(len(self.held[row]) for row in rows) >= CONTEXT:
            with pytest.raises(ValueError, match="context"):
                self.table.extend_each(wanted)
        elif at_border * self.page_size > self.allocator.available_tokens:
            with pytest.raises(OutOfSlotsError, match="--max-total-tokens"):
                self.table.extend_each(wanted)
        else:
            for row, slot in zip(rows, self.table.extend_each(wanted).tolist(), strict=True):
                self.held[row].append(slot)

    @rule(counts=st.lists(st.integers(0, 9), min_size=5, max_size=5))
    def extend_all(self, counts: list[int]) -> None:
        """By one call what ``extend`` gives row after row, or nothing where that is too much."""
        if not self.held:
            return
        rows, before = list(self.held), self.allocator.available_tokens
        wanted = np.array(counts[: len(rows)])
        grown = [len(self.held[row]) + count for row, count in zip(rows, counts, strict=False)]
        pages = sum(
            -(-new // self.page_size) - -(-len(self.held[row]) // self.page_size)
            for row, new in zip(rows, grown, strict=True)
        )
        if max(grown) > CONTEXT or pages * self.page_size > before:
            with pytest.raises((ValueError, OutOfSlotsError)):
                self.table.extend_each(np.array(rows), wanted)
            return
        slots = self.table.extend_each(np.array(rows), wanted)
        assert slots.dtype == np.int32
        for row, part in zip(rows, np.split(slots, np.cumsum(wanted)[:-1]), strict=True):
            self.held[row] += part.tolist()

    @rule()
    def release_all(self) -> None:
        rows, self.held = list(self.held), {}
        if rows:
            with pytest.raises(ValueError, match="not held"):
                self.table.release_each([*rows, self.max_rows], [(0, 0)] * (len(rows) + 1))
            self.table.release_each(rows, [(0, 0)] * len(rows))

    @rule(row=consumes(rows))
    def release(self, row: int) -> None:
        if self.held.pop(row, None) is None:
            with pytest.raises(ValueError, match="not held"):
                self.table.release(row)
        else:
            self.table.release(row)

    @invariant()
    def rows_and_pool_agree(self) -> None:
        if not hasattr(self, "held"):
            return
        owned = [slot for slots in self.held.values() for slot in slots]
        assert len(set(owned)) == len(owned)
        assert all(self.page_size <= s < self.page_size + self.allocator.num_tokens for s in owned)
        pages = 0
        for row, slots in self.held.items():
            assert self.table.slots(row).tolist() == slots
            for i, slot in enumerate(slots):
                assert slot % self.page_size == i % self.page_size
                assert slot - slots[i - i % self.page_size] == i % self.page_size
            pages += -(-len(slots) // self.page_size)
        taken = self.allocator.num_tokens - self.allocator.available_tokens
        assert taken == pages * self.page_size

    def teardown(self) -> None:
        for row in list(getattr(self, "held", {})):
            self.table.release(row)
        if hasattr(self, "table"):
            assert self.table.is_empty


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_double_free_is_an_error_and_frees_nothing():
    allocator = SlotAllocator(16, page_size=4)
    slots = allocator.grow(0, 6)
    allocator.free(slots)
    with pytest.raises(ValueError, match="free already"):
        allocator.free(slots)
    other = allocator.grow(0, 4)
    with pytest.raises(ValueError, match="free already"):
        allocator.free(np.concatenate([other, other]))
    with pytest.raises(ValueError, match="free already"):
        allocator.free(np.array([0], np.int32))
    assert allocator.available_tokens == 12


def test_slots_run_through_a_page_before_the_next_is_taken():
    allocator = SlotAllocator(12, page_size=4)
    first = allocator.grow(0, 2)
    allocator.grow(0, 1)
    more = allocator.grow(2, 5, last_slot=int(first[-1]))
    assert first.tolist() == [4, 5]
    assert more.tolist() == [6, 7, 12]
    with pytest.raises(ValueError, match="cannot grow"):
        allocator.grow(5, 4)


@pytest.mark.parametrize("page_size", [1, 16])
def test_kv_pool_holds_whole_pages_and_the_reserved_one(page_size: int):
    pool = KVPool(2, 40, 3, 8, torch.bfloat16, torch.device("cpu"), page_size)
    assert pool.num_tokens == 40 // page_size * page_size
    assert pool.num_slots == pool.num_tokens + page_size
    assert len(pool.tensors()) == 4
    for buffer in pool.tensors():
        assert buffer.shape == (pool.num_slots, 3, 8) and not buffer.any()
    total = sum(buffer.nbytes for buffer in pool.tensors())
    assert total == pool.num_slots * KVPool.bytes_per_token(2, 3, 8, torch.bfloat16)
    slots = SlotAllocator(40, page_size).grow(0, pool.num_tokens)
    assert slots.min() == page_size and slots.max() == pool.num_slots - 1


def test_bind_gives_each_layer_its_buffers_or_says_what_differs():
    def layer(heads: int = 2) -> SimpleNamespace:
        return SimpleNamespace(num_kv_heads=heads, head_dim=8)

    pool = KVPool(2, 16, 2, 8, torch.float32, torch.device("cpu"))
    layers = [layer(), layer()]
    pool.bind(layers)
    assert layers[1].k_cache is pool.k[1] and layers[0].v_cache is pool.v[0]
    with pytest.raises(ValueError, match="2 layers cannot serve 1"):
        pool.bind([layer()])
    with pytest.raises(ValueError, match="layer 1 has 4 KV heads"):
        pool.bind([layer(), layer(4)])


def test_a_pool_smaller_than_a_page_names_the_flags():
    with pytest.raises(ValueError, match="--max-total-tokens or lower --page-size"):
        KVPool(1, 8, 1, 8, torch.float32, torch.device("cpu"), page_size=16)
    with pytest.raises(ValueError, match="--page-size is 0"):
        SlotAllocator(8, page_size=0)
    with pytest.raises(ValueError, match="--max-running-requests"):
        RequestTable(0, CONTEXT, SlotAllocator(8))
