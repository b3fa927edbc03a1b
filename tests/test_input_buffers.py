"""From a batch to the static inputs: what is packed, written, sent, and remembered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.engine.tokenization import PromptEncoder
from breakgraph.forward import (
    DecodeInputs,
    ForwardBatch,
    ForwardMode,
    HostStaging,
    current_stream,
    pack,
    staging,
)
from breakgraph.memory import RequestTable, SlotAllocator
from breakgraph.runner.input_buffers import DecodeInputBuffers, PrefillInputBuffers

CPU = torch.device("cpu")
REQUESTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=6)


def make_buffers(kind: type[PrefillInputBuffers] = PrefillInputBuffers) -> PrefillInputBuffers:
    """For 64 rows of 6 requests; an embedding is its token's id."""
    return kind(
        max_tokens=64,
        max_requests=6,
        hidden_size=2,
        dtype=torch.float32,
        device=CPU,
        embed=lambda ids, out: out.copy_(ids.unsqueeze(1).expand(-1, 2)),
    )


def make_batch(requests: list[tuple[int, int]], seed: int, **fields: Any) -> ForwardBatch:
    """Of requests of so many new and cached tokens."""
    random = np.random.default_rng(seed)
    return ForwardBatch.from_requests(
        [random.integers(1, 99, new).tolist() for new, _ in requests],
        [random.integers(1, 99, new) for new, _ in requests],
        [random.integers(1, 99, cached) for _, cached in requests],
        **fields,
    )


@settings(deadline=None)
@given(requests=REQUESTS)
def test_a_batch_knows_places_as_a_loop_over_its_requests_does(requests: list[tuple[int, int]]):
    batch = make_batch(requests, 0)
    positions = [cached + i for new, cached in requests for i in range(new)]
    assert batch.positions.tolist() == positions and batch.positions.dtype == np.int64
    ends = np.cumsum([new for new, _ in requests])
    assert batch.last_token_rows.tolist() == (ends - 1).tolist()
    assert batch.longest == max(map(sum, requests))


@settings(deadline=None)
@given(batches=st.lists(st.tuples(REQUESTS, st.integers(0, 9), st.booleans()), max_size=5))
def test_one_fill_after_the_other_leaves_what_its_batch_says(
    batches: list[tuple[list[tuple[int, int]], int, bool]],
):
    buffers = make_buffers()
    for requests, padding, with_targets in batches:
        tokens = sum(new for new, _ in requests)
        targets = np.arange(tokens) - 1 if with_targets else None
        batch = make_batch(requests, padding, logprob_targets=targets)
        filled = buffers.fill(batch, rows := tokens + padding)
        inputs, zeros = filled.inputs, [0] * padding
        assert inputs is buffers.inputs(rows)
        assert inputs.hidden_states[:, 1].tolist() == batch.input_ids.tolist() + zeros
        assert inputs.positions.tolist() == batch.positions.tolist() + zeros
        assert inputs.out_cache_loc.tolist() == batch.out_cache_loc.tolist() + zeros
        assert inputs.num_token_non_padded.tolist() == [tokens]
        assert filled.extend_lens.tolist() == batch.extend_lens.tolist()
        assert filled.last_rows.tolist() == batch.last_token_rows.tolist()
        if targets is None:
            assert filled.logprob_targets is None
        else:
            assert filled.logprob_targets is not None
            assert filled.logprob_targets.tolist() == targets.tolist()


def test_padding_of_a_decode_has_a_row_of_its_own_and_one_token():
    batch = make_batch([(1, 4), (1, 2)], 0, mode=ForwardMode.DECODE, rows=np.array([3, 1]))
    inputs = make_buffers(DecodeInputBuffers).fill(batch, 4).inputs
    assert isinstance(inputs, DecodeInputs)
    assert inputs.request_rows.tolist() == [3, 1, 6, 6]
    assert inputs.seq_lens.tolist() == [5, 3, 1, 1]
    assert inputs.positions.tolist() == [4, 2, 0, 0]


def test_columns_begin_where_vector_loads_are_whole():
    inputs = make_buffers().inputs(16)
    first = inputs.num_token_non_padded.data_ptr()
    assert {(t.data_ptr() - first) % 128 for t in (inputs.positions, inputs.out_cache_loc)} == {0}


def test_a_ring_that_forgets_sends_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staging, "KEPT", 2)
    ring = HostStaging(8, CPU)
    for turn, count in enumerate([3, 8, 1, 3, 5, 8, 3]):
        ring.host()[:count] = np.arange(count) + turn
        assert ring.send(count).tolist() == [turn + i for i in range(count)]


def test_a_ring_sends_what_its_type_holds():
    ring = HostStaging(8, CPU, torch.int32)
    ring.host()[:3] = [1, -2, 2**31 - 1]
    assert ring.host().dtype == np.int32
    assert ring.send(3).tolist() == [1, -2, 2**31 - 1]


def test_a_stream_is_made_once_and_found_while_it_is_current(monkeypatch: pytest.MonkeyPatch):
    made, current = [], {0: 7}

    def make(index: int) -> object:
        made.append(current[index])
        return object()

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current.get, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", make)
    staging._kept_stream.cache_clear()
    first = current_stream(0)
    current[0] = 9
    second = current_stream(0)
    current[0] = 7
    assert current_stream(0) is first is not second and made == [7, 9]
    staging._kept_stream.cache_clear()


@pytest.mark.gpu
def test_the_current_stream_is_the_one_that_torch_names():
    with torch.cuda.stream(torch.cuda.Stream()):
        assert current_stream(torch.cuda.current_device()) == torch.cuda.current_stream()
    assert current_stream(torch.cuda.current_device()) == torch.cuda.current_stream()


@pytest.mark.parametrize(
    "parts", [[], [[]], [[5, 6]], [[5], [6, 7]], [np.array([5, 6], np.int32)], [(1, 2), (3,)]]
)
def test_packed_is_part_after_part(parts: list[Any]):
    packed = pack(parts)
    assert packed.dtype == np.int64 and packed.flags.writeable
    assert packed.tolist() == [x for part in parts for x in part]


def test_a_batch_keeps_its_slots_when_the_caller_writes_his():
    slots = np.arange(3)
    batch = ForwardBatch.from_requests([[5, 6, 7]], [slots])
    slots[:] = 9
    assert batch.out_cache_loc.tolist() == [0, 1, 2]


@pytest.mark.parametrize("page_size", [1, 4])
def test_slots_of_rows_are_those_of_each(page_size: int):
    table = RequestTable(4, 32, SlotAllocator(64, page_size))
    rows = np.array([table.acquire() for _ in range(3)])
    for counts in ([5, 1, 7], [1, 8, 2]):
        slots = table.extend_each(rows, np.array(counts))
        parts = [table.slots(row)[-count:] for row, count in zip(rows, counts, strict=True)]
        assert slots.tolist() == np.concatenate(parts).tolist()
    begins, ends = np.array([2, 0, 4]), np.array([6, 0, 9])
    expected = [table.slots(row)[b:e] for row, b, e in zip(rows, begins, ends, strict=True)]
    assert table.slots_of(rows, begins, ends).tolist() == np.concatenate(expected).tolist()


GOOD: list[Any] = [[1, 2], [3]]


@pytest.mark.parametrize(
    "bad", [[], [True], [1.0], [-1], [10], [2**70], ["a"], [[1]], "text", np.array([3, 11]), 5]
)
def test_prompts_are_refused_together_as_each_alone(bad: Any):
    encoder = PromptEncoder(None, 10)
    with pytest.raises(ValueError) as alone:
        encoder.encode_one(bad, "prompt 1")
    with pytest.raises(ValueError) as together:
        encoder.encode([GOOD[0], bad, GOOD[1]])
    assert str(alone.value) == str(together.value)


def test_encoded_prompts_are_copies():
    encoded = PromptEncoder(None, 10).encode(GOOD)
    assert encoded == GOOD and encoded[0] is not GOOD[0]
    mixed = PromptEncoder(None, 10).encode([(1, 2), np.array([3])])
    assert mixed == GOOD and all(type(token) is int for ids in mixed for token in ids)
