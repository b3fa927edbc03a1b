"""Attention over parts of the keys merges to attention over all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from breakgraph.kernels import partial_attention
from breakgraph.kernels.partial_attention import attention_with_lse, merge_attention_


@given(cuts=st.sets(st.integers(1, 29), max_size=5), seed=st.integers(0, 99))
def test_parts_merge_to_the_whole(cuts: set[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 3, 8, generator=generator) * 3 for n in (5, 30))
    v = torch.randn(30, 3, 6, generator=generator)
    whole, whole_lse = attention_with_lse(q, k, v, 0.5, causal=False)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    ends = [*sorted(cuts), 30]
    out, lse = attention_with_lse(q, k[: ends[0]], v[: ends[0]], 0.5, causal=False)
    for start, end in pairwise(ends):
        part = attention_with_lse(q, k[start:end], v[start:end], 0.5, causal=False)
        merge_attention_(out, lse, *part)
    torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_in_blocks_change_nothing(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 20, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = attention_with_lse(q, k, v, 0.3, causal=causal)
    monkeypatch.setattr(partial_attention, "MAX_SCORES", 3 * 2 * 20)
    for got, wanted in zip(attention_with_lse(q, k, v, 0.3, causal=causal), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    if causal:
        alone = attention_with_lse(q[:1], k[:1], v[:1], 0.3, causal=True)
        torch.testing.assert_close(alone[0][0], v[0])
        torch.testing.assert_close(expected[0][0], v[0])
