"""Llama, Qwen2 and Qwen3 give the logits of transformers, packed, cached or embedded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import (
    LLAMA3_ROPE,
    Slots,
    batch_inputs,
    edit_config,
    make_reference,
    random_prompts,
    run_batch,
    run_prompts,
    save_checkpoint,
)

from breakgraph.attention import TorchNativeBackend
from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.layers import ClassificationHead
from breakgraph.layers.norm import fold_norms
from breakgraph.models import MODELS, CausalLM, ModelLoadError, SequenceClassifier, load_model

EXPERTS = {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CAUSAL = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biased": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama3.1": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "qwen2-yarn": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "yarn", "factor": 4.0}},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "qwen3-moe-mixed": (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True, "attention_bias": True},
    ),
}


@pytest.fixture(
    scope="module",
    params=[(name, folded) for folded in (False, True) for name in CAUSAL],
    ids=lambda param: f"{param[0]}-folded" if param[1] else param[0],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A reference model, and ours loaded from its checkpoint, its norms apart or folded."""
    name, folded = request.param
    architecture, config = CAUSAL[name]
    reference = make_reference(architecture, **config)
    model = load_model(save_checkpoint(reference, tmp_path_factory.mktemp("checkpoint")))
    if folded:
        fold_norms(model)
    return reference, model


@torch.no_grad()
def assert_logits_match(reference: Any, model: Any, prompts: Any, prefix_lens: Any = ()) -> None:
    for prompt, hidden in zip(prompts, run_prompts(model, prompts, prefix_lens), strict=True):
        expected = reference(torch.tensor([prompt])).logits[0]
        assert expected.std() > 0.5  # else the tolerance would mean nothing
        torch.testing.assert_close(hidden @ model.lm_head_weight.T, expected, atol=1e-4, rtol=0)


def test_packed_prompts_of_mixed_lengths(pair: Any) -> None:
    assert_logits_match(*pair, random_prompts([1, 7, 40, 2, 23]))


def test_prompts_with_cached_prefixes(pair: Any) -> None:
    prompts = random_prompts([9, 30, 12, 5], seed=1)
    assert_logits_match(*pair, prompts, prefix_lens=[8, 17, 0, 1])


@torch.no_grad()
def test_stack_leaves_its_inputs_and_ignores_padding(pair: Any) -> None:
    _, model = pair
    slots = Slots(model)
    batch = ForwardBatch.from_requests(random_prompts([5, 3]), [slots.take(5), slots.take(3)])
    expected = run_batch(model, batch)

    padded = ForwardBatch.from_requests(
        [batch.input_ids[:5], batch.input_ids[5:], [0] * 4],
        [batch.out_cache_loc[:5], batch.out_cache_loc[5:], [0] * 4],
    )
    inputs = batch_inputs(model.embed(torch.from_numpy(padded.input_ids)), padded)
    before = inputs.hidden_states.clone()
    backend = TorchNativeBackend(torch.device("cpu"))
    backend.init_forward_metadata(batch)
    with forward_context(batch, backend):
        hidden = model.get_layer_stack()(inputs)
    assert torch.equal(inputs.hidden_states, before)
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[:8], expected, atol=1e-5, rtol=0)


def test_embeddings_in_place_of_ids(pair: Any) -> None:
    _, model = pair
    ids = random_prompts([6, 11])
    slots = Slots(model)
    where = [slots.take(6), slots.take(11)]
    batch = ForwardBatch.from_requests(ids, where)
    embeds = torch.full((17, 32), float("nan"))
    assert model.embed(torch.from_numpy(batch.input_ids), out=embeds) is embeds
    given = ForwardBatch.from_requests([[0] * 6, [0] * 11], where, input_embeds=embeds)
    assert torch.equal(run_batch(model, given), run_batch(model, batch))


def test_config_written_before_transformers_5(tmp_path: Any) -> None:
    reference = make_reference("LlamaForCausalLM", rope_parameters=LLAMA3_ROPE)
    save_checkpoint(reference, tmp_path)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=LLAMA3_ROPE["rope_theta"],
        rope_scaling=scaling,
        dtype=None,
        torch_dtype="float32",
    )
    assert_logits_match(reference, load_model(tmp_path), random_prompts([40]))


@pytest.mark.parametrize(
    "architecture",
    [
        "LlamaForSequenceClassification",
        "Qwen2ForSequenceClassification",
        "Qwen3ForSequenceClassification",
    ],
)
@torch.no_grad()
def test_sequence_classification(architecture: str, tmp_path: Any) -> None:
    reference = make_reference(architecture, num_labels=3)
    model = load_model(save_checkpoint(reference, tmp_path))
    assert isinstance(model, SequenceClassifier)
    prompts = random_prompts([4, 1, 19])
    hidden = torch.cat(run_prompts(model, prompts))
    scores = ClassificationHead()(hidden, model.score.weight, torch.tensor([3, 4, 23]))
    expected = torch.cat([reference(torch.tensor([prompt])).logits for prompt in prompts])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["LlamaModel", "Qwen2Model", "Qwen3Model"])
@torch.no_grad()
def test_bare_model(architecture: str, tmp_path: Any) -> None:
    reference = make_reference(architecture)
    model = load_model(save_checkpoint(reference, tmp_path))
    assert not isinstance(model, CausalLM)
    prompts = random_prompts([4, 13])
    for prompt, hidden in zip(prompts, run_prompts(model, prompts), strict=True):
        expected = reference(torch.tensor([prompt])).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=0)


def test_every_known_architecture_is_tested() -> None:
    heads = ("ForCausalLM", "ForSequenceClassification", "Model")
    dense = {name + head for name in ("Llama", "Qwen2", "Qwen3") for head in heads}
    # Hybrids: test_hybrid_models.py; DeepSeek: test_deepseek_models.py.
    others = ("Qwen3Moe", "NemotronH", "Qwen3Next", "DeepseekV2", "DeepseekV3")
    assert set(MODELS) == dense | {name + head for name in others for head in heads[::2]}


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("Qwen2ForCausalLM", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            "Qwen3ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 1,
                "layer_types": None,
            },
            "window of 64 in a context of 128",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic' is not supported",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5}},
            "only rotation of whole heads",
        ),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    ],
)
def test_unsupported_config_is_refused(
    architecture: str, config: dict[str, Any], message: str, tmp_path: Any
) -> None:
    reference = make_reference(architecture, head_dim=8)
    reference.config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[architecture], **config)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path, load_format="dummy")


def test_window_as_long_as_the_context_is_no_window(tmp_path: Any) -> None:
    window = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}
    reference = make_reference("Qwen3ForCausalLM", **window)
    model = load_model(save_checkpoint(reference, tmp_path))
    assert_logits_match(reference, model, random_prompts([50]))
