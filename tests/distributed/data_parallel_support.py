"""Small mixtures of experts, and engines of ranks that hold different requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from hybrid_support import save_hybrid
from models_support import make_reference, random_prompts, save_checkpoint

from breakgraph import Engine
from breakgraph.engine.data_parallel import RankedScheduler
from breakgraph.engine.request import Request, Want
from breakgraph.engine.sampling_params import SamplingParams

SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE = {**SIZES, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 8}
DEEPSEEK = {
    **SIZES,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "topk_method": "greedy",
    "norm_topk_prob": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", MOE),
    "qwen3-moe-mixed": ("Qwen3MoeForCausalLM", {**MOE, "mlp_only_layers": [0]}),
    "qwen3-moe-tied": ("Qwen3MoeForCausalLM", {**MOE, "tie_word_embeddings": True}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 2, "topk_group": 1}),
}
HYBRID_NAMES = ["nemotron_h-latent", "qwen3_next", "qwen3_next-biased"]
BREAKABLE = {
    "enable_breakable_cuda_graph": True,
    "piecewise_cuda_graph_tokens": [16, 64],
    "prefill_dispatch": "always",
    "max_prefill_padding": 64.0,
}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "replayed": {**BREAKABLE, "cuda_graph_bs": [1, 4]},
}
PROMPTS = random_prompts([1, 5, 23, 40, 3, 64, 17])


def save_models(root: Path, names: Iterable[str] = (*MODELS, *HYBRID_NAMES)) -> dict[str, Path]:
    """Checkpoints by name."""
    for name in names:
        if name in MODELS:
            architecture, config = MODELS[name]
            save_checkpoint(make_reference(architecture, **config), root / name)
        else:
            save_hybrid(name, root / name)
    return {name: root / name for name in names}


def make_engine(folder: Path, size: int, **flags: Any) -> Engine:
    """An engine of ``size`` ranks, each of which holds requests of its own."""
    settings: dict[str, Any] = {
        "dp_size": size,
        "device": "cpu",
        "skip_tokenizer_init": True,
        "chunked_prefill_size": 64,
        "max_total_tokens": 512,
        "max_running_requests": 4,
    }
    return Engine(model_path=str(folder), tp_size=size, **settings | flags)


def ranks_of(engine: Engine) -> RankedScheduler:
    scheduler = engine._scheduler
    assert isinstance(scheduler, RankedScheduler)
    return scheduler


def by_turns(engine: Engine, prompts: Sequence[list[int]]) -> list[Request]:
    """The requests of ``prompts``, four tokens each: the first two together, then one by one."""
    scheduler, requests = ranks_of(engine), list[Request]()
    with engine._turn("generate", Want.TOKENS) as admission:
        params = SamplingParams(max_new_tokens=4, temperature=0)
        for ids in prompts:
            request = admission.continuation(list(ids), params, admission.rule(params))
            requests.append(request)
            scheduler.add(request)
            if len(requests) > 1:
                while scheduler.has_work:
                    scheduler.step()
    return requests


def outcome(folder: Path, size: int, **flags: Any) -> tuple[list[Any], list[Any]]:
    """Prefills and generations."""
    with make_engine(folder, size, **flags) as engine:
        prefills = engine.prefill(PROMPTS, return_logprob=True)
        tokens = engine.generate(PROMPTS, max_new_tokens=6)
    return prefills, tokens


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
