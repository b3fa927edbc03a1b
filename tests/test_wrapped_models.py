"""Transformers classes run wrapped give what they give alone, or are refused with the reason."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import wrapped_support as support
from engine_support import byte_tokenizer
from models_support import VOCAB, edit_config, poison, random_prompts, save_checkpoint
from transformers import masking_utils

import breakgraph
from breakgraph import Engine
from breakgraph.forward import ForwardBatch
from breakgraph.models import ModelLoadError, load_model
from breakgraph.models.transformers_impl import TransformersModel, attention, plan, wrap_model
from breakgraph.models.transformers_impl.interface import NAME
from breakgraph.models.transformers_impl.reach import MaskShapeError, Reach, reach_of
from breakgraph.runner import GraphCaptureError

CPU = torch.device("cpu")
KINDS = (  # plain, window and soft cap, sinks, chunks, latent heads with experts
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForCausalLM, attn_temperature_tuning off",
    "DeepseekV3ForCausalLM",
)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """A capture collects garbage first, which among the modules of transformers takes 0.2 s."""
    for name in [*support.DECODERS, *support.ENCODERS]:
        getattr(transformers, name.partition(",")[0])
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def documented_rows() -> dict[str, str]:
    lines = support.DOCUMENT.read_text().splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def save_model(name: str, folder: Path, **config: Any) -> Any:
    """Save a random model that has no end token."""
    model = support.make_wrappable(name, **config)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    save_checkpoint(model, folder)
    return model


def make_engine(folder: Path, **flags: Any) -> Engine:
    settings = {"skip_tokenizer_init": True, "device": "cpu", "enable_breakable_cuda_graph": True}
    return Engine(model_path=str(folder), **support.FLAGS | settings | flags)


# The table.


@pytest.mark.parametrize("name", support.DECODERS)
def test_decoder_is_what_the_table_says(name: str) -> None:
    outcome = support.try_decoder(name)
    assert outcome.row == documented_rows()[name]
    assert outcome.spread > 0.05  # else the tolerance would mean nothing
    assert outcome.error <= 1e-4
    assert outcome.same_text


@pytest.mark.parametrize("name", support.ENCODERS)
def test_encoder_is_what_the_table_says(name: str) -> None:
    outcome = support.try_encoder(name)
    assert outcome.row == documented_rows()[name]
    assert outcome.spread > 0.001
    assert outcome.error <= 1e-4


def test_table_has_no_row_that_is_not_checked() -> None:
    rows = set(documented_rows()) - {"class", "---"}
    assert rows == {*support.DECODERS, *support.ENCODERS}


# Loading.


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


def test_auto_takes_our_own_file_where_there_is_one(tmp_path: Path) -> None:
    save_model("Qwen3ForCausalLM", tmp_path / "known", head_dim=8)
    save_model("GlmForCausalLM", tmp_path / "unknown")
    native = load_model(tmp_path / "known")
    wrapped = load_model(tmp_path / "known", model_impl="transformers")
    assert not isinstance(native, TransformersModel)
    assert isinstance(wrapped, TransformersModel)
    assert isinstance(load_model(tmp_path / "unknown"), TransformersModel)
    with pytest.raises(ModelLoadError, match="unknown architecture"):
        load_model(tmp_path / "unknown", model_impl="native")


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


def test_dummy_weights_need_a_config_alone(tmp_path: Path) -> None:
    support.make_wrappable("GlmForCausalLM").config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["GlmForCausalLM"])
    models = [load_model(tmp_path, load_format="dummy", random_seed=seed) for seed in (1, 1, 2)]
    weights = [next(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_missing_weight_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model("GlmForCausalLM", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"missing or misshapen: {name}"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    save_model("GlmForCausalLM", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="transformers cannot load"):
        load_model(tmp_path)


def test_code_of_the_folder_runs_only_if_it_is_trusted(tmp_path: Path) -> None:
    model = save_model("GlmForCausalLM", tmp_path)
    edit_config(
        tmp_path,
        architectures=["HouseForCausalLM"],
        model_type="house",
        auto_map={
            "AutoConfig": "modeling_house.HouseConfig",
            "AutoModelForCausalLM": "modeling_house.HouseForCausalLM",
        },
    )
    (tmp_path / "modeling_house.py").write_text(
        "from transformers import GlmConfig, GlmForCausalLM\n"
        "class HouseConfig(GlmConfig):\n    model_type = 'house'\n"
        "class HouseForCausalLM(GlmForCausalLM):\n    config_class = HouseConfig\n"
    )
    with pytest.raises(ModelLoadError, match="only with --trust-remote-code"):
        load_model(tmp_path)
    engine = make_engine(tmp_path, trust_remote_code=True)
    ids = random_prompts([9])[0]
    assert engine.generate([ids], 3)[0].token_ids == support.own_text(model, ids, 3)


def test_architecture_that_nobody_has_names_both(tmp_path: Path) -> None:
    save_model("GlmForCausalLM", tmp_path)
    edit_config(tmp_path, architectures=["NobodyForCausalLM"])
    with pytest.raises(ModelLoadError, match=r"NobodyForCausalLM.*neither breakgraph nor transf"):
        load_model(tmp_path)


# A model that is loaded already.


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


# What cannot be captured, and what cannot be run.


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
    with pytest.raises(ModelLoadError, match=r"attends outside .*\(.*test_wrapped_models.py:\d+"):
        wrap_model(support.make_wrappable("GlmForCausalLM"))


# What a query sees.


@pytest.mark.parametrize(
    ("function", "size", "reach"),
    [
        (masking_utils.causal_mask_function, None, Reach()),
        (masking_utils.bidirectional_mask_function, None, Reach(right=None)),
        (masking_utils.sliding_window_causal_mask_function(9), 9, Reach(left=8)),
        (masking_utils.sliding_window_causal_mask_function(1), 1, Reach(left=0)),
        (
            masking_utils.sliding_window_bidirectional_mask_function(5),
            5,
            Reach(left=5, right=5),
        ),
        (
            masking_utils.chunked_causal_mask_function(6, torch.zeros(1, dtype=torch.int64)),
            6,
            Reach(chunk=6),
        ),
    ],
)
def test_mask_functions_of_transformers_are_known(
    function: Any, size: int | None, reach: Reach
) -> None:
    assert reach_of(function, size, CPU) == reach


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: (k <= q) & (k != 3),
        masking_utils.and_masks(
            masking_utils.causal_mask_function,
            masking_utils.padding_mask_function(torch.ones(1, 4, dtype=torch.bool)),
        ),
    ],
)
def test_mask_of_another_shape_is_refused(function: Any) -> None:
    with pytest.raises(MaskShapeError):
        reach_of(function, 4, CPU)


@pytest.mark.parametrize(
    "reach", [Reach(), Reach(right=None), Reach(left=3), Reach(left=2, right=2), Reach(chunk=4)]
)
def test_range_of_keys_holds_all_that_are_seen(reach: Reach) -> None:
    at = torch.arange(13)
    for first in range(13):
        for end in range(first + 1, 14):
            begin, stop = reach.keys_of(first, end, 13)
            seen = reach.visible(at[first:end], at).any(0).nonzero().flatten()
            assert begin <= int(seen.min())
            assert int(seen.max()) < stop


def test_window_that_no_sequence_fills_is_none() -> None:
    assert Reach(left=127).within(128) == Reach(left=127, chunk=128).within(128) == Reach()
    assert Reach(left=126).within(128) == Reach(left=126)
    model = support.make_wrappable("MistralForCausalLM", sliding_window=128)
    assert wrap_model(model).decode_limits == ""


# Encoders.


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


# On a GPU.


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
