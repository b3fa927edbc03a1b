"""Draws follow the distribution asked for, and depend on the request's seed and step alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from breakgraph.engine.request import Request
from breakgraph.engine.sampling import draw, penalise, sample, uniform
from breakgraph.engine.sampling_params import SamplingParams

VOCAB = 40
DRAWS = 20_000


def request(new: Sequence[int] = (), seed: int = 0, **params: Any) -> Request:
    one = Request([1, 2], SamplingParams(**params), 1000)
    one.seed = seed
    for token in new:
        one.append(token)
    return one


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (rows, VOCAB))).float()


def reference(row: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution by definition: temperature, then top-k, then top-p, then min-p."""
    scaled = row.double().numpy() / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0
    probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


CASES = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 5},
    "top-k of one": {"top_k": 1},
    "top-p": {"top_p": 0.7},
    "a tiny top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.2},
    "min-p of one": {"min_p": 1.0},
    "all of them": {"temperature": 1.4, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    "no top-k": {"top_k": -1, "top_p": 0.9},
}


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_draws_follow_the_distribution(params: dict):
    row = logits()
    requests = [request(seed=seed, **params) for seed in range(DRAWS)]
    tokens = draw(row.expand(DRAWS, VOCAB), requests).numpy()
    expected = reference(row[0], requests[0].params) * DRAWS
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()  # the mask, exactly
    often = expected > 5
    chi_square = float((((counts - expected) ** 2)[often] / expected[often]).sum())
    freedom = max(int(often.sum()) - 1, 1)
    # Wilson-Hilferty: a chi-square as a normal deviate; beyond 4 it is one in 30,000.
    root = (chi_square / freedom) ** (1 / 3)
    deviate = (root - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert deviate < 4


def test_steps_of_one_seed_follow_the_distribution_too():
    row = logits(seed=3)
    one = request(seed=11)
    tokens = []
    for _ in range(4000):
        tokens.append(sample(row, [one])[0][0])
        one.append(0)
    expected = reference(row[0], one.params)
    assert abs(np.bincount(tokens, minlength=VOCAB) / 4000 - expected).max() < 0.03


def test_many_likely_tokens_are_sorted_not_selected():
    wide = torch.zeros(1, 5000)
    wide[0, :3000] = 5
    requests = [request(seed=seed, top_k=2000) for seed in range(50)]
    assert draw(wide.expand(50, 5000), requests).max() < 3000
    requests = [request(seed=seed, top_p=0.5) for seed in range(50)]
    assert draw(wide.expand(50, 5000), requests).max() < 3000


def test_a_draw_does_not_depend_on_its_neighbours():
    rows = logits(9)
    settings = [*CASES.values(), {"temperature": 0}][:9]
    requests = [
        request([3] * i, seed=i, frequency_penalty=0.1 * i, logprobs=i % 3, **params)
        for i, params in enumerate(settings)
    ]
    together = sample(rows, requests)
    for i, one in enumerate(requests):
        assert sample(rows[i : i + 1], [one])[0][0] == together[i][0]
    backwards = sample(rows.flip(0), requests[::-1])[::-1]
    assert [token for token, _ in backwards] == [token for token, _ in together]


def test_seed_and_step_make_the_draw():
    def draws(seed: int) -> list[int]:
        one = request(seed=seed, temperature=2.0)
        for step in range(20):
            one.append(sample(logits(seed=step), [one])[0][0])
        return one.new_ids

    assert draws(1) == draws(1) != draws(2)
    values = [uniform(seed, step) for seed in range(-20, 20) for step in range(50)]
    assert len(set(values)) > 1990 and min(values) >= 0 and max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 0.03
    assert uniform(1 << 70, 3) == uniform((1 << 70) % (1 << 64), 3)


def test_greedy_takes_the_first_of_the_likeliest():
    row = torch.zeros(2, VOCAB)
    row[:, [7, 9]] = 1.0
    greedy, drawn = request(temperature=0), request(seed=4)
    assert sample(row[:1], [greedy])[0] == (7, None)
    assert sample(row, [greedy, drawn])[0] == (7, None)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=20), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties(new: list[int], frequency: float, presence: float):
    rows = logits(2)
    one = request(new, frequency_penalty=frequency, presence_penalty=presence)
    expected = rows[0].clone()
    for token in set(new):
        expected[token] -= frequency * new.count(token) + presence
    before = rows.clone()
    found = penalise(rows, [one, request(new)])
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[1], rows[1]) and torch.equal(rows, before)


def test_log_probabilities_are_the_models_own():
    rows = logits(3)
    requests = [
        request([1, 1], logprobs=0, temperature=0, frequency_penalty=2.0),
        request(logprobs=4, temperature=0.5, top_k=3),
        request(),
    ]
    results = sample(rows, requests)
    expected = rows.log_softmax(-1)
    for row, (token, found) in enumerate(results[:2]):
        assert found is not None and found.token_id == token
        assert found.logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
    assert results[0][1].top == [] and results[2][1] is None
    values, ids = expected[1].topk(4)
    assert [token for token, _ in results[1][1].top] == ids.tolist()
    np.testing.assert_allclose([v for _, v in results[1][1].top], values, atol=1e-5)


def test_more_alternatives_than_tokens():
    assert len(sample(logits(), [request(logprobs=100)])[0][1].top) == VOCAB


BAD = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ({"max_new_tokens": True}, "max_new_tokens"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": "x"}, "seed"),
    ({"stop": ("a", "")}, "stop string is empty"),
    ({"stop": (3,)}, "stop"),
    ({"stop_token_ids": (-1,)}, "stop_token_ids"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"logprobs": 101}, "logprobs is 101; it must be from 0 to 100"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_bad_value_is_named(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_good_values_are_kept_as_tuples():
    params = SamplingParams(stop="ab", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("ab",) and params.stop_token_ids == (1, 2)
    assert SamplingParams(top_k=1).is_greedy and SamplingParams(temperature=0).is_greedy
    assert not SamplingParams().is_greedy
