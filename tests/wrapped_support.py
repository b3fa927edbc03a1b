"""Small random models of transformers, run wrapped, and the table of docs/models.md made of them.

``python tests/wrapped_support.py`` writes the table anew.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_support import make_reference, random_prompts, save_checkpoint

import breakgraph
from breakgraph import Engine
from breakgraph.models import MODELS, ModelLoadError

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
LENGTHS = (5, 17, 1, 12)
NEW_TOKENS = 3
FLAGS: dict[str, Any] = {
    "max_running_requests": 4,
    "chunked_prefill_size": 48,
    "max_total_tokens": 256,
    "piecewise_cuda_graph_tokens": (48,),
    "cuda_graph_backend_decode": "full",
    "cuda_graph_bs": (4,),
    "prefill_dispatch": "always",
    "max_prefill_padding": 16.0,
}

_MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_MLA = {
    **_MOE,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
}
_LLAMA4 = {
    **_MOE,
    "head_dim": 8,
    "attention_chunk_size": 8,
    "intermediate_size_mlp": 48,
    "no_rope_layers": [1, 0],
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 8}
_LABELS = {"num_labels": 3}
_LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    },
}

DECODERS: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": {},
    "ArceeForCausalLM": {},
    "BioGptForCausalLM": {},
    "BitNetForCausalLM": {},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "CodeGenForCausalLM": {**_GPT, "rotary_dim": 4},
    "CohereForCausalLM": {},
    "Cohere2ForCausalLM": _WINDOW,
    "CTRLLMHeadModel": {**_GPT, "dff": 48},
    "DeepseekV2ForCausalLM": {**_MLA, "n_group": 1},
    "DeepseekV3ForCausalLM": _MLA,
    "DiffLlamaForCausalLM": {},
    "DogeForCausalLM": {},
    "Dots1ForCausalLM": {**_MOE, **_HEAD, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "Ernie4_5ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {**_MOE, "moe_num_experts": 4, "moe_k": 2},
    "Exaone4ForCausalLM": _WINDOW,
    "FalconForCausalLM": {},
    "GemmaForCausalLM": _HEAD,
    "Gemma2ForCausalLM": {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {**_HEAD, **_WINDOW},
    "GlmForCausalLM": _HEAD,
    "Glm4ForCausalLM": _HEAD,
    "Glm4MoeForCausalLM": {**_MOE, **_HEAD, "first_k_dense_replace": 1},
    "GPT2LMHeadModel": _GPT,
    "GPTBigCodeForCausalLM": _GPT,
    "GPTJForCausalLM": {**_GPT, "rotary_dim": 4},
    "GPTNeoForCausalLM": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTNeoXForCausalLM": {},
    "GptOssForCausalLM": {**_MOE, **_HEAD, **_WINDOW},
    "GraniteForCausalLM": {"logits_scaling": 2.0, "attention_multiplier": 0.3},
    "GraniteMoeForCausalLM": _MOE,
    "HeliumForCausalLM": _HEAD,
    "HunYuanDenseV1ForCausalLM": _HEAD,
    "JetMoeForCausalLM": {**_MOE, "kv_channels": 8},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForCausalLM, attn_temperature_tuning off": {**_LLAMA4, "attn_temperature_tuning": False},
    "MiniMaxForCausalLM": {**_MOE, **_HEAD},
    "MistralForCausalLM": _WINDOW,
    "MixtralForCausalLM": _MOE,
    "MptForCausalLM": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "NemotronForCausalLM": {},
    "OlmoForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": _WINDOW,
    "OlmoeForCausalLM": _MOE,
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "PersimmonForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "Phi3ForCausalLM, longrope": _LONGROPE,
    "PhimoeForCausalLM": _MOE,
    "Qwen2MoeForCausalLM": {**_MOE, "shared_expert_intermediate_size": 16},
    "SeedOssForCausalLM": _HEAD,
    "SmolLM3ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {"sliding_window": None},
    "VaultGemmaForCausalLM": {**_HEAD, **_WINDOW},
    "XGLMForCausalLM": {"d_model": 32, "attention_heads": 4, "ffn_dim": 48, "num_layers": 2},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "AlbertModel": {"embedding_size": 32},
    "BertModel": {},
    "BertForSequenceClassification": _LABELS,
    "DebertaV2Model": {},
    "DistilBertModel": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
    "ElectraModel": {"embedding_size": 32},
    "EuroBertModel": {},
    "GemmaForSequenceClassification": {**_HEAD, **_LABELS},
    "JinaEmbeddingsV3Model": {},
    "MistralModel": {},
    "ModernBertModel": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "ModernBertForSequenceClassification": {
        **_LABELS,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
    },
    "MPNetModel": {},
    "NomicBertModel": {},
    "RobertaModel": {},
    "RobertaForSequenceClassification": _LABELS,
    "T5EncoderModel": {},
    "XLMRobertaModel": {},
    "XLMRobertaForSequenceClassification": _LABELS,
}


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        name: as in the lists above.
        error: largest difference of a logit, score or element from the class's own.
        spread: deviation of the class's own, to hold the error against.
        same_text: whether greedy tokens were those of the class.
        cells: its row of the table.
    """

    name: str
    error: float = 0.0
    spread: float = 1.0
    same_text: bool = True
    cells: list[str] = field(default_factory=list)

    @property
    def row(self) -> str:
        return f"| {' | '.join([self.name, *self.cells])} |"


def make_wrappable(name: str, **config: Any) -> Any:
    """A random model, by the settings of ``DECODERS`` or ``ENCODERS`` if it is there."""
    settings = {**DECODERS, **ENCODERS}.get(name, {})
    return make_reference(name.partition(",")[0], **settings | config)


def save_model(name: str, folder: Path, **config: Any) -> Any:
    """Save a random model that has no end token."""
    model = make_wrappable(name, **config)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    save_checkpoint(model, folder)
    return model


def make_engine(folder: Path, **flags: Any) -> Engine:
    settings = {"skip_tokenizer_init": True, "device": "cpu", "enable_breakable_cuda_graph": True}
    return Engine(model_path=str(folder), **FLAGS | settings | flags)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """A capture collects garbage first, which among the modules of transformers takes 0.2 s.

    Every test uses it in a file that binds this name.
    """
    for name in [*DECODERS, *ENCODERS]:
        getattr(transformers, name.partition(",")[0])
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@torch.no_grad()
def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The class's own ``[tokens, vocab_size]`` of one sequence."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def own_text(model: Any, ids: list[int], count: int) -> list[int]:
    """``count`` greedy tokens by the class alone, without a cache."""
    text = list(ids)
    for _ in range(count):
        text.append(int(own_logits(model, text)[-1].argmax()))
    return text[len(ids) :]


def try_decoder(name: str) -> Outcome:
    """Wrap, prefill four prompts at once and generate, against the class itself."""
    outcome, model = Outcome(name), make_wrappable(name)
    try:
        engine = breakgraph.wrap(model, **FLAGS)
    except ModelLoadError as error:
        outcome.cells = ["refused", "", "", _reason(error)]
        return outcome
    prompts = random_prompts(LENGTHS)
    results = engine.prefill(prompts)
    own = torch.stack([own_logits(model, ids)[-1] for ids in prompts])
    found = torch.stack([result.next_token_logits for result in results])
    outcome.error, outcome.spread = float((found - own).abs().max()), float(own.std())
    for ids, text in zip(prompts, engine.generate(prompts, NEW_TOKENS), strict=True):
        outcome.same_text &= text.token_ids == own_text(model, ids, len(text.token_ids))
    runs = "own file, or wrapped" if name in MODELS else "wrapped"
    outcome.cells = [runs, *_graphs(engine), _limits(engine)]
    return outcome


@torch.no_grad()
def try_encoder(name: str) -> Outcome:
    """Wrap and embed or score four texts at once, against the class itself."""
    outcome, model = Outcome(name), make_wrappable(name)
    scores = name.endswith("Classification")
    try:
        engine = breakgraph.wrap(model, **FLAGS, is_embedding=True, pooling="mean")
    except ModelLoadError as error:
        outcome.cells = ["refused", "", "", _reason(error)]
        return outcome
    texts = random_prompts(LENGTHS)
    found, outputs = engine.embed(texts), [model(input_ids=torch.tensor([ids])) for ids in texts]
    if scores:
        own = torch.cat([output.logits for output in outputs])
    else:
        means = torch.stack([output[0][0].mean(0) for output in outputs])
        own = torch.nn.functional.normalize(means, dim=-1)
    outcome.error, outcome.spread = float((found - own).abs().max()), float(own.std())
    outcome.cells = ["wrapped", _graphs(engine)[0], "", _limits(engine)]
    return outcome


def _graphs(engine: Engine) -> list[str]:
    """How prefill and decode ran, by what was dispatched."""
    runner, said = engine.runner, []
    for graphs, counts in (
        (runner.graph_runner, runner.dispatch_counts),
        (runner.decode_graph_runner, runner.decode_dispatch_counts),
    ):
        if graphs is None or set(map(str, counts)) != {"replayed"}:
            said.append("eager")
        else:
            breaks = graphs.graphs[max(graphs.graphs)].num_breaks
            plural = "" if breaks == 1 else "s"
            said.append(f"replayed, {breaks} break{plural}" if breaks else "replayed, whole")
    return said


def _limits(engine: Engine) -> str:
    runner = engine.runner
    said = [runner.model.decode_limits] if runner.model.decode_limits else []
    if runner.context_length < 127:
        said.append(f"context of {runner.context_length}, not 128")
    if runner.graph_runner is None:
        said.append("the class waits for the device")
    return ", ".join(said)


def _reason(error: ModelLoadError) -> str:
    """The message without the place, which is another one in each release."""
    text = re.sub(r" \([^()]*\.py:\d+[^()]*\)", "", str(error))
    return re.sub(r" \(off by [^)]*\)", "", text)


def table() -> str:
    """All rows, decoders first."""
    os.environ["TQDM_DISABLE"] = "1"
    rows = [try_decoder(name).row for name in DECODERS] + [try_encoder(n).row for n in ENCODERS]
    head = "| class | runs | prefill | decode | beyond causal attention, or why not |"
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows])


def write_table() -> None:
    """Put the table in place of the one in the document."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition("| class | runs |")
    after = rest[rest.index("\n\n") :]
    DOCUMENT.write_text(before + table() + after)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(table() + "\n") if "--print" in sys.argv else write_table()
