"""Encoders run whole sequences, and pool as their folder says or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wrapped_support as support
from models_support import random_prompts, save_checkpoint
from wrapped_support import make_engine

from breakgraph.forward import ForwardBatch
from breakgraph.models import ModelLoadError

frozen_heap = support.frozen_heap


def save_encoder(folder: Path, pooling: dict[str, Any] | None, *more: str) -> Any:
    model = support.make_wrappable("BertModel")
    save_checkpoint(model, folder)
    if pooling is not None:
        kinds = ["Transformer", "Pooling", *more]
        steps = [
            {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(steps))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return model


@pytest.mark.parametrize(
    ("pooling", "more", "pick", "unit"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, [], "cls", False),
        ({"pooling_mode_mean_tokens": True}, ["Normalize"], "mean", True),
        ({"pooling_mode": "lasttoken"}, ["Normalize"], "last", True),
        (None, [], "mean", True),
    ],
)
@torch.no_grad()
def test_pooling_is_that_of_the_folder(
    pooling: dict[str, Any] | None, more: list[str], pick: str, unit: bool, tmp_path: Path
) -> None:
    model = save_encoder(tmp_path, pooling, *more)
    texts = random_prompts(support.LENGTHS)
    found = make_engine(tmp_path, is_embedding=True).embed(texts)
    hidden = [model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in texts]
    choose = {"cls": lambda h: h[0], "mean": lambda h: h.mean(0), "last": lambda h: h[-1]}[pick]
    own = torch.stack([choose(rows) for rows in hidden])
    own = torch.nn.functional.normalize(own, dim=-1) if unit else own
    torch.testing.assert_close(found, own, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("pooling", "more", "message"),
    [
        ({"pooling_mode_max_tokens": True}, [], "pools by pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, [], "pools by .* and"),
        ({"pooling_mode_mean_tokens": True}, ["Dense"], "a step 'Dense', which is not done here"),
    ],
)
def test_pooling_that_is_not_done_is_refused(
    pooling: dict[str, Any], more: list[str], message: str, tmp_path: Path
) -> None:
    save_encoder(tmp_path, pooling, *more)
    with pytest.raises(ModelLoadError, match=message):
        make_engine(tmp_path, is_embedding=True)
    make_engine(tmp_path, is_embedding=True, pooling="cls")


def test_encoder_runs_whole_sequences_and_generates_nothing(tmp_path: Path) -> None:
    save_encoder(tmp_path, None)
    engine = make_engine(tmp_path)
    with pytest.raises(ValueError, match="no language-model head"):
        engine.generate([[1, 2]])
    part = ForwardBatch.from_requests([[1, 2]], [[3, 4]], [[1, 2]])
    with pytest.raises(ValueError, match="one forward, whole"):
        engine.runner.forward(part)


def test_packed_rows_may_be_more_than_an_encoder_has_positions(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, None)
    texts = random_prompts([100, 90, 60, 12])
    flags = {"chunked_prefill_size": 270, "piecewise_cuda_graph_tokens": (270,)}
    engine = make_engine(tmp_path, is_embedding=True, max_total_tokens=300, **flags)
    found = engine.embed(texts)
    assert engine.runner.bucket_hits[270] == 1
    with torch.no_grad():
        own = [model(input_ids=torch.tensor([ids]))[0][0].mean(0) for ids in texts]
    own_unit = torch.nn.functional.normalize(torch.stack(own), dim=-1)
    torch.testing.assert_close(found, own_unit, atol=1e-4, rtol=0)
