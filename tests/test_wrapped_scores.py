"""Classifiers of transformers: what their scores are made of, and in how many calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import random_prompts
from wrapped_support import FLAGS, make_wrappable

import breakgraph

LENGTHS = (5, 9, 1, 14)


def count_calls(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[tuple[int, ...]]:
    """The shapes of the ids that ``model``'s own forward is called with, from now on."""
    calls, forward = [], type(model).forward

    def counting(self: Any, *args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(tuple(input_ids.shape))
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    return calls


@torch.no_grad()
def own_scores(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in prompts])


@pytest.mark.parametrize(
    ("name", "more", "at_once"),
    [
        ("BertForSequenceClassification", {}, True),
        ("ModernBertForSequenceClassification", {"classifier_pooling": "mean"}, False),
        ("GemmaForSequenceClassification", {}, True),
        ("GemmaForSequenceClassification", {"pad_token_id": None}, False),
    ],
)
def test_scores_of_one_row_each_are_made_in_one_call(
    name: str, more: dict[str, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch
):
    model = make_wrappable(name, **more)
    prompts = random_prompts(LENGTHS)
    own = own_scores(model, prompts)
    engine = breakgraph.wrap(model, **FLAGS, is_embedding=True)
    calls = count_calls(monkeypatch, model)
    torch.testing.assert_close(engine.embed(prompts), own, atol=1e-5, rtol=1e-4)
    assert calls == ([(len(LENGTHS), 1)] if at_once else [(1, length) for length in LENGTHS])


def test_a_prompt_that_ends_in_padding_is_scored_as_the_class_scores_it(
    monkeypatch: pytest.MonkeyPatch,
):
    model = make_wrappable("GemmaForSequenceClassification")
    prompts = random_prompts(LENGTHS)
    prompts[1][-2:] = [model.config.pad_token_id] * 2
    own = own_scores(model, prompts)
    engine = breakgraph.wrap(model, **FLAGS, is_embedding=True)
    calls = count_calls(monkeypatch, model)
    torch.testing.assert_close(engine.embed(prompts), own, atol=1e-5, rtol=1e-4)
    assert calls == [(1, length) for length in LENGTHS]
