"""Every cached row is served once, in the way that is cheaper for its request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from breakgraph.attention import LatentShape
from breakgraph.attention.latent_plan import plan_prefixes
from breakgraph.forward import ForwardBatch

DEEPSEEK_V3 = LatentShape(num_heads=128, nope_dim=128, rope_dim=64, value_dim=128, rank=512)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=6),
    chunk=st.integers(1, 100),
    absorbed=st.integers(1, 100),
)
def test_every_cached_token_is_in_one_part(
    lengths: list[tuple[int, int]], chunk: int, absorbed: int
) -> None:
    shape = LatentShape(num_heads=2, nope_dim=8, rope_dim=4, value_dim=6, rank=16)
    new, old = zip(*lengths, strict=True)
    slots = [list(range(1, count + 1)) for count in old]
    ids = [[0] * count for count in new]
    batch = ForwardBatch.from_requests(ids, ids, slots)
    row_owner, key_owner = np.repeat(range(len(new)), new), np.repeat(range(len(old)), old)
    seen = np.zeros(sum(old), int)
    for part in plan_prefixes(batch, shape, chunk, absorbed):
        seen[slice(*part.keys)] += 1
        assert 0 < sum(part.key_lens) <= (absorbed if part.absorbed else chunk)
        rows, keys = row_owner[slice(*part.rows)], key_owner[slice(*part.keys)]
        owners = sorted(set(rows))
        assert [int((rows == i).sum()) for i in owners] == list(part.new_lens)
        assert [int((keys == i).sum()) for i in owners] == list(part.key_lens)
        assert list(part.new_lens) == [new[i] for i in owners]
        assert {shape.prefers_absorbed(new[i], old[i]) for i in owners} == {part.absorbed}
        assert len(owners) == 1 or not part.absorbed
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("new", "prefix", "absorbed"),
    [(1, 0, False), (1, 1, False), (1, 2, True), (170, 10**6, True), (171, 10**6, False)],
)
def test_few_new_tokens_behind_a_long_prefix_are_absorbed(
    new: int, prefix: int, absorbed: bool
) -> None:
    assert DEEPSEEK_V3.prefers_absorbed(new, prefix) is absorbed
