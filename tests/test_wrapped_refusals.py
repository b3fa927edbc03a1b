"""What cannot be captured runs eagerly, what cannot be run is refused, and each names its line."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import wrapped_support as support
from models_support import random_prompts

import breakgraph
from breakgraph.models import ModelLoadError
from breakgraph.models.transformers_impl import wrap_model
from breakgraph.runner import GraphCaptureError

frozen_heap = support.frozen_heap


def test_host_sync_is_said_with_its_line_and_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = breakgraph.wrap(support.make_wrappable("JetMoeForCausalLM"), **support.FLAGS)
    assert "tolist() copies to the host" in caplog.text
    assert "modeling_jetmoe.py:" in caplog.text
    assert "every prefill of JetMoeForCausalLM runs eagerly" in caplog.text
    result = engine.prefill([[1, 2, 3]])[0]
    assert (result.bucket, result.reason) == (None, "model_not_capturable")
    assert "does what no graph can hold" in engine.explain([[1, 2, 3]])


def test_host_sync_is_an_error_where_it_is_asked_to_be() -> None:
    model = support.make_wrappable("JetMoeForCausalLM")
    with pytest.raises(GraphCaptureError, match=r"modeling_jetmoe.py:\d+"):
        breakgraph.wrap(model, **support.FLAGS, cuda_graph_failure="error")


def test_experts_are_computed_another_way_where_the_first_is_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def syncing(self: Any, hidden: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
        hidden.sum().item()
        return grouped(self, hidden, *routed)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", syncing)
    model = support.make_wrappable("MixtralForCausalLM")
    engine = breakgraph.wrap(model, **support.FLAGS)
    ids = random_prompts([9])[0]
    result = engine.prefill([ids])[0]
    assert result.reason == "replayed"
    torch.testing.assert_close(
        result.next_token_logits, support.own_logits(model, ids)[-1], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FalconForCausalLM", r"FalconModel \(.*modeling_falcon.py:\d+\) attends outside"),
        ("Lfm2ForCausalLM", r"Lfm2Model \(.*:\d+\) gives other results for packed sequences"),
        ("DogeForCausalLM", r"computes with its attention mask \(.*modeling_doge.py:\d+\)"),
        ("Llama4ForCausalLM", r"counts the rows of its input \(.*modeling_llama4.py:\d+\)"),
        ("T5EncoderModel", "takes no position_ids"),
    ],
)
def test_refusal_names_the_line(name: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        wrap_model(support.make_wrappable(name))


def test_attention_beside_the_interface_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.glm import modeling_glm

    own = modeling_glm.GlmMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        heads = x.unsqueeze(1)
        more = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return own(self, x) + more.squeeze(1)

    monkeypatch.setattr(modeling_glm.GlmMLP, "forward", forward)
    with pytest.raises(ModelLoadError, match=r"attends outside .*\(.*test_wrapped_refusals.py:\d+"):
        wrap_model(support.make_wrappable("GlmForCausalLM"))
