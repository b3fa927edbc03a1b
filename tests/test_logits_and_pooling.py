"""The eager tails: logits, log-probabilities, pooling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from breakgraph.layers import LogitsProcessor, Pooler

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, chunk_rows=st.integers(1, 50), seed=st.integers(0, 1000))
def test_logits_and_logprobs(lengths: list[int], chunk_rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), 8, generator=generator)
    weight = torch.randn(31, 8, generator=generator)
    targets = torch.randint(-1, 31, (sum(lengths),), generator=generator)
    last_rows = torch.tensor(lengths).cumsum(0) - 1
    output = LogitsProcessor(chunk_rows)(hidden, weight, last_rows, targets)

    logits = hidden @ weight.T
    torch.testing.assert_close(output.next_token_logits, logits[last_rows])
    logprobs = output.input_token_logprobs
    assert logprobs is not None and logprobs.dtype == torch.float32
    wanted = targets >= 0
    expected = logits.log_softmax(-1)[wanted, targets[wanted]]
    torch.testing.assert_close(logprobs[wanted], expected)
    assert logprobs[~wanted].isnan().all()


def test_logprobs_only_when_asked_for() -> None:
    output = LogitsProcessor()(torch.randn(5, 8), torch.randn(31, 8), torch.tensor([1, 4]))
    assert output.input_token_logprobs is None
    assert output.next_token_logits.shape == (2, 31)


def test_half_precision_gives_float32() -> None:
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(31, 8).bfloat16()
    output = LogitsProcessor()(hidden, weight, torch.tensor([4]), torch.tensor([3] * 5))
    assert output.next_token_logits.dtype == torch.float32
    assert output.input_token_logprobs is not None
    assert output.input_token_logprobs.dtype == torch.float32
    assert Pooler("mean")(hidden, torch.tensor([5])).dtype == torch.float32


NAIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "last": lambda rows: rows[-1],
    "cls": lambda rows: rows[0],
    "mean": lambda rows: rows.mean(0),
}


@settings(deadline=None, max_examples=60)
@given(
    mode=st.sampled_from(["last", "cls", "mean"]),
    normalize=st.booleans(),
    lengths=LENGTHS,
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_pooling_matches_a_loop(
    mode: str, normalize: bool, lengths: list[int], dtype: torch.dtype
) -> None:
    hidden = torch.randn(sum(lengths), 6)
    pooled = Pooler(mode, normalize=normalize)(hidden, torch.tensor(lengths, dtype=dtype))  # type: ignore[arg-type]
    expected = torch.stack([NAIVE[mode](rows) for rows in hidden.split(lengths)])
    if normalize:
        expected = F.normalize(expected)
    torch.testing.assert_close(pooled, expected)


def test_a_request_of_infinities_leaves_the_others_alone() -> None:
    hidden = torch.ones(6, 4)
    hidden[:3] = float("inf")
    pooled = Pooler("mean", normalize=False)(hidden, torch.tensor([3, 3]))
    assert torch.equal(pooled[1], torch.ones(4))


def test_a_long_mean_keeps_its_precision() -> None:
    hidden = (torch.randn(20_000, 4) + 1).bfloat16()
    pooled = Pooler("mean", normalize=False)(hidden, torch.tensor([20_000]))
    torch.testing.assert_close(pooled[0], hidden.double().mean(0).float(), rtol=1e-5, atol=0)


def test_unknown_pooling_lists_the_known() -> None:
    with pytest.raises(ValueError, match="last, mean, cls"):
        Pooler("max")  # type: ignore[arg-type]
