"""Transformers classes run wrapped give what they give alone, cached, in chunks or limited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import wrapped_support as support
from models_support import poison, random_prompts
from wrapped_support import make_engine, save_model

import breakgraph
from breakgraph.models.transformers_impl import attention, plan, wrap_model

frozen_heap = support.frozen_heap
KINDS = (  # plain, window and soft cap, sinks, chunks, latent heads with experts
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForCausalLM, attn_temperature_tuning off",
    "DeepseekV3ForCausalLM",
)


@pytest.mark.parametrize("name", KINDS)
def test_chunks_cached_prefixes_and_decodes_from_a_folder(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    engine = make_engine(
        tmp_path,
        model_impl="transformers",
        chunked_prefill_size=16,
        piecewise_cuda_graph_tokens=(16,),
        disable_radix_cache=False,
    )
    start = random_prompts([20])[0]
    prompts = [start + end for end in random_prompts([21, 1, 8], seed=1)]
    poison(engine.runner)
    results = engine.generate(prompts, max_new_tokens=4)
    for ids, result in zip(prompts, results, strict=True):
        assert result.token_ids == support.own_text(model, ids, 4)
    assert any(result.cached_tokens for result in results)
    assert {str(reason) for reason in engine.runner.dispatch_counts} == {"replayed"}
    assert {str(reason) for reason in engine.runner.decode_dispatch_counts} == {"replayed"}


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_limited_attention_goes_in_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    monkeypatch.setattr(plan, "GATHERED_ROWS", 24)
    model = save_model(name, tmp_path)
    engine = make_engine(tmp_path, cuda_graph_backend_decode="disabled")
    prompts = random_prompts(support.LENGTHS)
    for ids, result in zip(prompts, engine.generate(prompts, 3), strict=True):
        assert result.token_ids == support.own_text(model, ids, 3)


def test_a_soft_cap_counts_where_the_class_itself_would_drop_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = support.make_wrappable("Gemma2ForCausalLM")
    prompt = random_prompts([30])[0]
    model.set_attn_implementation("eager")
    capped = support.own_logits(model, prompt)[-1]
    # As transformers 5.17 has it; later ones refuse the two together.
    attentions = transformers.AttentionInterface._global_mapping
    plain = attentions["sdpa"]

    def drop(*args: Any, softcap: float | None = None, **more: Any) -> Any:
        return plain(*args, **more)

    monkeypatch.setitem(attentions, "sdpa", drop)
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    model.set_attn_implementation("sdpa")
    dropped = support.own_logits(model, prompt)[-1]
    assert (dropped - capped).abs().max() > 1e-3
    result = breakgraph.wrap(model, **support.FLAGS).prefill([prompt])[0]
    torch.testing.assert_close(result.next_token_logits, capped, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == "sdpa"


def test_native_and_wrapped_give_the_same_logits(tmp_path: Path) -> None:
    save_model("Qwen3ForCausalLM", tmp_path, head_dim=8)
    prompts = random_prompts(support.LENGTHS)
    own, wrapped = (
        make_engine(tmp_path, model_impl=impl).prefill(prompts, return_logprob=True)
        for impl in ("native", "transformers")
    )
    for a, b in zip(own, wrapped, strict=True):
        torch.testing.assert_close(a.next_token_logits, b.next_token_logits, atol=1e-4, rtol=0)
        assert a.input_token_logprobs is not None and b.input_token_logprobs is not None
        assert a.input_token_logprobs[1:] == pytest.approx(b.input_token_logprobs[1:], abs=1e-4)


def test_prompt_logprobs_of_a_head_that_is_the_class_s_own(tmp_path: Path) -> None:
    model = save_model("GraniteForCausalLM", tmp_path)
    ids = random_prompts([9])[0]
    found = make_engine(tmp_path).prefill([ids], return_logprob=True)[0].input_token_logprobs
    own = support.own_logits(model, ids).log_softmax(-1)
    assert found is not None
    assert found[1:] == pytest.approx([own[i, ids[i + 1]].item() for i in range(8)], abs=1e-4)


@torch.no_grad()
def test_cap_on_logits_is_seen_where_logits_are_small() -> None:
    model = support.make_wrappable("Gemma2ForCausalLM")
    model.get_output_embeddings().weight.mul_(1e-3)
    head = wrap_model(model).logits_head
    assert not isinstance(head, torch.Tensor)
    plain = support.make_wrappable("Gemma2ForCausalLM", final_logit_softcapping=None)
    assert isinstance(wrap_model(plain).logits_head, torch.Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["MistralForCausalLM", "ModernBertModel", *KINDS])
@torch.no_grad()
def test_half_precision_on_a_gpu_is_near_the_class(name: str) -> None:
    model = support.make_wrappable(name).to("cuda", torch.bfloat16)
    encoder = name.endswith("Model")
    flags = {"is_embedding": True, "pooling": "last"} if encoder else {}
    engine = breakgraph.wrap(model, **support.FLAGS | {"max_total_tokens": 4096} | flags)
    prompts = random_prompts(support.LENGTHS)
    own = [model(input_ids=torch.tensor([ids], device="cuda"))[0][0, -1].float() for ids in prompts]
    if encoder:
        found = engine.embed(prompts)
        expected = torch.nn.functional.normalize(torch.stack(own), dim=-1).cpu()
        assert engine.runner.dispatch_counts.keys() == {"replayed"}
    else:
        results = engine.prefill(prompts)
        assert {result.reason for result in results} == {"replayed"}
        found = torch.stack([result.next_token_logits for result in results]).cpu()
        expected = torch.stack(own).cpu()
        engine.generate(prompts, 3)
        assert {str(reason) for reason in engine.runner.decode_dispatch_counts} == {"replayed"}
    assert ((found - expected).norm() / expected.norm()).item() < 0.1
