"""``breakgraph.wrap`` runs a model that is loaded already, and leaves it to its owner as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
import wrapped_support as support
from engine_support import byte_tokenizer
from models_support import VOCAB, random_prompts

import breakgraph
from breakgraph.forward import ForwardBatch
from breakgraph.models import ModelLoadError
from breakgraph.models.transformers_impl import wrap_model
from breakgraph.models.transformers_impl.interface import NAME

frozen_heap = support.frozen_heap


def test_wrapped_model_computes_for_its_owner_what_it_did() -> None:
    model = support.make_wrappable("Gemma2ForCausalLM")
    ids = random_prompts([20])[0]
    before, chosen = support.own_logits(model, ids), model.config._attn_implementation
    engine = breakgraph.wrap(model, **support.FLAGS)
    engine.generate([ids], 2)
    assert torch.equal(support.own_logits(model, ids), before)
    assert model.config._attn_implementation == chosen
    assert engine.runner.model.get_layer_stack().decoder is model.get_decoder()  # no copy


def test_wrap_reads_texts_with_a_tokenizer_and_ends_where_the_model_ends() -> None:
    model = support.make_wrappable("GlmForCausalLM", vocab_size=300)
    engine = breakgraph.wrap(model, byte_tokenizer(), **support.FLAGS)
    first = engine.generate("what is it", 8)[0]
    assert first.text
    model.generation_config.eos_token_id = first.token_ids[2]
    ended = breakgraph.wrap(model, byte_tokenizer(), **support.FLAGS).generate("what is it", 8)[0]
    stop = first.token_ids.index(first.token_ids[2])
    assert ended.token_ids[: stop + 1] == first.token_ids[: stop + 1]
    assert ended.finish_reason == "stop"


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="Linear is no transformers model"):
        wrap_model(torch.nn.Linear(2, 2))


def test_implementation_is_ours_within_a_forward_alone() -> None:
    model = support.make_wrappable("GlmForCausalLM")
    breakgraph.wrap(model, **support.FLAGS)
    model.config._attn_implementation = NAME
    with pytest.raises(RuntimeError, match=r"call the model through breakgraph\.wrap"):
        support.own_logits(model, [1, 2, 3])


@torch.no_grad()
def test_language_part_of_a_multimodal_model_runs_from_embeddings() -> None:
    text = {"model_type": "qwen3", **support.make_wrappable("Qwen3ForCausalLM").config.to_dict()}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=VOCAB - 1,
        attn_implementation="eager",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.25)
    ids = [*random_prompts([6])[0], *[VOCAB - 1] * 4, *random_prompts([5], seed=1)[0]]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(1, 3, 8, 8)}
    own = model(**inputs).logits[0, -1]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    image = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[0, 6:10] = torch.cat(list(image)).to(embeds.dtype)

    runner = breakgraph.wrap(model, **support.FLAGS).runner
    row = runner.requests.acquire()
    slots = runner.requests.extend(row, len(ids))
    batch = ForwardBatch.from_requests([[0] * len(ids)], [slots], input_embeds=embeds[0])
    result = runner.forward(batch)
    assert result.dispatch.bucket is not None
    assert result.next_token_logits is not None
    torch.testing.assert_close(result.next_token_logits[0], own, atol=1e-4, rtol=0)
