"""Fused kernels take the place of parts of a transformers class, and of nothing that differs."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import wrapped_support as support
from models_support import random_prompts
from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

import breakgraph
from breakgraph.attention import flashinfer
from breakgraph.graph.inspect import describe
from breakgraph.models.transformers_impl import TransformersModel, wrap_model
from breakgraph.models.transformers_impl.compiling import compile_token_wise
from breakgraph.models.transformers_impl.fused import (
    LARGEST_ERROR,
    FusedAddNorm,
    FusedFeedForward,
    FusedLayerNorm,
    FusedNorm,
    row_error,
)
from breakgraph.models.transformers_impl.fused_attention import FusedAttention

IDS = random_prompts([20])[0]
SHAPES: dict[str, dict[str, Any]] = {"Qwen3ForCausalLM": {"head_dim": 8}}


def make(name: str = "LlamaForCausalLM", **config: Any) -> Any:
    return support.make_wrappable(name, **SHAPES.get(name, {}) | config)


def counts(model: TransformersModel) -> tuple[int, int, int]:
    """Norms, feed-forward blocks and attention modules that are replaced."""
    kinds = Counter(type(one) for one in model.parts.switches.forwards.values())
    norms = kinds[FusedNorm] + kinds[FusedLayerNorm] + kinds[FusedAddNorm]
    return norms, kinds[FusedFeedForward], kinds[FusedAttention]


def last_logits(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    logits = breakgraph.wrap(model, **support.FLAGS).prefill([ids])[0].next_token_logits
    assert logits is not None
    return logits


def mean_vector(model: Any) -> torch.Tensor:
    flags = {"is_embedding": True, "pooling": "mean", "max_total_tokens": 4096}
    return breakgraph.wrap(model, **support.FLAGS | flags).embed([IDS])[0]


@torch.no_grad()
def own_mean_vector(model: Any) -> torch.Tensor:
    hidden = model(input_ids=torch.tensor([IDS], device=model.device))[0][0]
    return torch.nn.functional.normalize(hidden.float().mean(0), dim=-1).cpu()


# What is replaced.


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("LlamaForCausalLM", (5, 2, 2)),
        ("Qwen3ForCausalLM", (5, 2, 2)),  # its norms of heads go with the attention
        ("Phi3ForCausalLM", (5, 2, 2)),  # one linear for three, and one for gate and up
        ("GemmaForCausalLM", (5, 0, 2)),  # weights around zero; not gated by SiLU
        ("Gemma3ForCausalLM", (9, 0, 2)),  # norms behind the heads
        ("Olmo2ForCausalLM", (5, 2, 2)),  # norms of all heads at once
        ("GptOssForCausalLM", (5, 0, 2)),  # cosines for half of a head, sinks
        ("GlmForCausalLM", (5, 2, 0)),  # rotates neighbours
        ("HunYuanDenseV1ForCausalLM", (9, 2, 0)),  # normalises heads after their rotation
        ("DiffLlamaForCausalLM", (5, 2, 0)),  # two attention calls a module
        ("MixtralForCausalLM", (5, 0, 2)),
        ("CohereForCausalLM", (3, 2, 0)),  # about the mean, without a bias
        ("GPT2LMHeadModel", (5, 0, 0)),
        ("NemotronForCausalLM", (0, 0, 2)),  # about the mean, weights around zero
        ("ModernBertModel", (5, 0, 2)),
        ("BertModel", (5, 0, 0)),
    ],
)
def test_parts_are_known_by_what_they_do(
    name: str, replaced: tuple[int, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert counts(wrap_model(make(name))) == replaced
    said = "{} norms, {} feed-forward blocks and {} attention modules of {} run by fused kernels"
    assert said.format(*replaced, name) in caplog.text


DECODER_OPS = {
    "aten.mm": 4,
    "aten.add": 2,
    "breakgraph.rms_norm": 2,
    "breakgraph.silu_mul": 1,
    "breakgraph.qk_norm_rope_store": 1,
}
ENCODER_OPS = {
    "aten.addmm": 6,
    "breakgraph.layer_norm": 2,  # additions and norms
    "aten.gelu": 1,
    "aten.zeros_like": 1,
}


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("LlamaForCausalLM", DECODER_OPS),
        ("Qwen3ForCausalLM", DECODER_OPS),
        ("BertModel", ENCODER_OPS),
        ("ElectraModel", ENCODER_OPS),
        ("XLMRobertaModel", ENCODER_OPS),
    ],
)
def test_a_layer_is_captured_in_few_ops(name: str, ops: dict[str, int]) -> None:
    embeds = name.endswith("Model")
    model = make(name, num_hidden_layers=3)
    engine = breakgraph.wrap(model, **support.FLAGS, is_embedding=embeds)
    (graph,) = engine.runner.graph_runner.graphs.values()
    between = [step for step in describe(graph) if step.kind == "segment"][1]
    assert Counter(name.rsplit(".", 1)[0] for name in between.op_names) == ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"])
@torch.no_grad()
def test_half_precision_is_within_the_stated_error(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    wrapped = wrap_model(model)
    assert sum(counts(wrapped)) >= 9
    for module, forward in wrapped.parts.switches.forwards.items():
        if isinstance(forward, FusedAttention):
            continue
        x = torch.randn(1, 101, model.config.hidden_size).to(dtype)
        assert row_error(forward(x), module(x)) <= LARGEST_ERROR[dtype]
    own = support.own_logits(model, IDS)[-1].float()
    assert row_error(last_logits(model).float(), own) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_added_rows_in_half_precision_are_within_the_stated_error(dtype: torch.dtype) -> None:
    forwards = wrap_model(make("BertModel").to(dtype)).parts.switches.forwards
    blocks = {module: one for module, one in forwards.items() if isinstance(one, FusedAddNorm)}
    assert len(blocks) == 4
    for module, forward in blocks.items():
        x, residual = (torch.randn(1, 101, n).to(dtype) for n in module.dense.weight.shape[::-1])
        assert row_error(forward(x, residual), module(x, residual)) <= LARGEST_ERROR[dtype]


def test_double_precision_is_left_alone() -> None:
    assert counts(wrap_model(make().double())) == (0, 0, 0)


# What differs.


def _clamped(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate = self.act_fn(self.gate_proj(x)).clamp(max=7.0)
    result: torch.Tensor = self.down_proj(gate * self.up_proj(x))
    return result


def _about_half_the_mean(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True) / 2
    result: torch.Tensor = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return result


def _other_epsilon(self: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return result


def _keys_alone(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q, k * cos + modeling_llama.rotate_half(k) * sin


@pytest.mark.parametrize(
    ("target", "attribute", "function", "replaced"),
    [
        (modeling_llama.LlamaMLP, "forward", _clamped, (5, 0, 2)),
        (modeling_llama.LlamaRMSNorm, "forward", _about_half_the_mean, (0, 2, 2)),
        (modeling_llama.LlamaRMSNorm, "forward", _other_epsilon, (0, 2, 2)),
        (modeling_llama, "apply_rotary_pos_emb", _keys_alone, (5, 2, 0)),
    ],
)
def test_what_differs_from_its_kind_stays_as_it_is(
    target: Any,
    attribute: str,
    function: Any,
    replaced: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(target, attribute, function)
    model = make()
    with caplog.at_level(logging.DEBUG, "breakgraph.models.transformers_impl"):
        assert counts(wrap_model(model)) == replaced
    assert "stays as it is: fused, a row is off by" in caplog.text
    own = support.own_logits(model, IDS)[-1]
    torch.testing.assert_close(last_logits(model), own, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("original", "replaced"), [(32, (5, 2, 0)), (128, (5, 2, 2))])
def test_what_depends_on_far_positions_is_seen(
    original: int, replaced: tuple[int, int, int]
) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": original,
        "llama_4_scaling_beta": 0.5,
    }
    model = make("Ministral3ForCausalLM", head_dim=8, rope_parameters=rope)
    assert counts(wrap_model(model)) == replaced
    ids = random_prompts([44])[0]
    own = support.own_logits(model, ids)[-1]
    torch.testing.assert_close(last_logits(model, ids), own, atol=1e-4, rtol=0)


def _added_twice(self: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.LayerNorm(self.dense(x) + 2 * residual)
    return result


def _added_after(self: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.LayerNorm(self.dense(x)) + residual
    return result


@pytest.mark.parametrize("function", [_added_twice, _added_after])
def test_a_norm_stays_fused_where_what_it_is_added_to_differs(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_bert.BertOutput, "forward", function)
    model = make("BertModel")
    kinds = Counter(type(one) for one in wrap_model(model).parts.switches.forwards.values())
    assert kinds == {FusedLayerNorm: 3, FusedAddNorm: 2}
    torch.testing.assert_close(mean_vector(model), own_mean_vector(model), atol=1e-5, rtol=0)


def test_a_norm_that_somebody_watches_is_called() -> None:
    model = make("BertModel")
    norm, called = model.encoder.layer[0].output.LayerNorm, []
    norm.register_forward_hook(lambda *_: called.append(1))
    forwards = wrap_model(model).parts.switches.forwards
    assert isinstance(forwards[norm], FusedLayerNorm)
    assert model.encoder.layer[0].output not in forwards
    called.clear()
    mean_vector(model)
    assert called


def test_rows_with_gaps_are_left_to_the_class() -> None:
    model = make()
    model.model.norm.register_forward_pre_hook(lambda _, args: args[0].mT.contiguous().mT)
    assert counts(wrap_model(model)) == (4, 2, 2)
    own = support.own_logits(model, IDS)[-1]
    torch.testing.assert_close(last_logits(model), own, atol=1e-4, rtol=0)


def test_one_that_differs_keeps_no_other_from_its_kernel() -> None:
    model = make()
    first, second = model.model.layers
    first.input_layernorm.forward = lambda x: 2 * x
    second.mlp.act_fn = nn.GELU()
    assert counts(wrap_model(model)) == (4, 1, 2)
    assert "forward" in vars(first.input_layernorm)
    own = support.own_logits(model, IDS)[-1]
    torch.testing.assert_close(last_logits(model), own, atol=1e-4, rtol=0)


def test_linears_that_do_more_than_multiply_are_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = make()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.k_proj.__class__ = Doubled
    called: list[int] = []
    mlp.up_proj.register_forward_hook(lambda *_: called.append(1))
    assert counts(wrap_model(model)) == (5, 2, 2)
    called.clear()
    own = support.own_logits(model, IDS)[-1]
    assert called == [1]
    torch.testing.assert_close(last_logits(model), own, atol=1e-4, rtol=0)
    assert len(called) > 1
    alone = (linear.weight for linear in (attention.q_proj, attention.k_proj, mlp.up_proj))
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in alone)


# The owner's model.


def test_the_owner_has_the_class_he_had(tmp_path: Path) -> None:
    model = make("Qwen3ForCausalLM", attention_bias=True)
    parameters = dict(model.named_parameters())
    values = {name: one.detach().clone() for name, one in parameters.items()}
    before = support.own_logits(model, IDS)
    tokens = {"inputs": torch.tensor([IDS]), "max_new_tokens": 4, "do_sample": False}
    text = model.generate(**tokens)
    engine = breakgraph.wrap(model, **support.FLAGS)
    engine.generate([IDS], 2)
    assert torch.equal(support.own_logits(model, IDS), before)
    assert torch.equal(model.generate(**tokens), text)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(one is parameters[name] for name, one in model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in values.items())
    model(input_ids=torch.tensor([IDS])).logits.sum().backward()
    assert all(one.grad is not None for one in model.parameters())
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(one, values[name]) for name, one in read.named_parameters())


def test_weights_are_held_once_and_stay_where_a_first_engine_found_them() -> None:
    model = make()
    engine = breakgraph.wrap(model, **support.FLAGS)
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    groups = (
        [mlp.gate_proj, mlp.up_proj],
        [attention.q_proj, attention.k_proj, attention.v_proj],
    )
    for group in groups:
        storages = {linear.weight.untyped_storage().data_ptr() for linear in group}
        assert len(storages) == 1
        size = group[0].weight.untyped_storage().nbytes()
        assert size == sum(linear.weight.nbytes for linear in group)
    places = [one.data_ptr() for one in model.parameters()]
    expected = engine.prefill([IDS])[0].next_token_logits
    again = last_logits(model)
    assert [one.data_ptr() for one in model.parameters()] == places
    assert torch.equal(again, expected)
    with torch.no_grad():
        mlp.up_proj.weight.mul_(2)  # an owner's change is everybody's
    own = support.own_logits(model, IDS)[-1]
    changed = engine.prefill([IDS])[0].next_token_logits
    torch.testing.assert_close(changed, own, atol=1e-4, rtol=0)


# With others.


@pytest.mark.parametrize(
    ("name", "compiled"), [("LlamaForCausalLM", 0), ("GemmaForCausalLM", 2), ("GlmForCausalLM", 0)]
)
def test_what_is_fused_is_not_compiled(name: str, compiled: int) -> None:
    torch.compiler.reset()
    model = wrap_model(make(name))
    fused = dict(model.parts.switches.forwards)
    assert compile_token_wise(model, "aot_eager") == compiled
    forwards = model.parts.switches.forwards
    assert len(forwards) == len(fused) + compiled
    assert all(forwards[module] is forward for module, forward in fused.items())


def test_flash_attention_3_serves_a_class_as_it_serves_native_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flashinfer, "missing_for", lambda device: None)
    for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"):
        model = wrap_model(make(name, head_dim=128, hidden_size=512))
        layers, device = model.parts.layers, torch.device("cpu")
        assert flashinfer.unserved(layers, torch.bfloat16, device) is None


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("LlamaForCausalLM", (5, 2, 2)),
        ("Qwen3ForCausalLM", (5, 2, 2)),
        ("Phi3ForCausalLM", (5, 2, 2)),
        ("Gemma3ForCausalLM", (9, 0, 2)),
        ("Olmo2ForCausalLM", (5, 2, 2)),
        ("GptOssForCausalLM", (5, 0, 2)),
    ],
)
def test_kernels_on_a_gpu_take_the_same_places(name: str, replaced: tuple[int, int, int]) -> None:
    model = make(name).to("cuda", torch.bfloat16)
    engine = breakgraph.wrap(model, **support.FLAGS | {"max_total_tokens": 4096})
    assert counts(engine.runner.model) == replaced
    with torch.no_grad():
        own = model(input_ids=torch.tensor([IDS], device="cuda")).logits[0, -1].float().cpu()
    result = engine.prefill([IDS])[0]
    assert result.reason == "replayed"
    assert row_error(result.next_token_logits.float().cpu(), own) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_kernels_on_a_gpu_take_the_places_of_an_encoders_norms(
    name: str, dtype: torch.dtype
) -> None:
    model = make(name).to("cuda", dtype)
    assert counts(wrap_model(model))[0] == 5
    assert row_error(mean_vector(model), own_mean_vector(model)) < 0.1
