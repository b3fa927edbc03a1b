"""Small random DeepSeek models, a runner of each, and the ways to serve its cached rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decode_support import make_runner
from hybrid_support import Requests
from models_support import make_reference, poison, save_checkpoint

from breakgraph.attention import LatentPrefillBackend, LatentShape
from breakgraph.forward import ForwardBatch
from breakgraph.runner import DispatchReason, ForwardResult, ModelRunner

CONTEXT = 256
BASE: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": (V2, {**BASE, "q_lora_rank": None, "topk_method": "greedy"}),
    "v2": (V2, {**BASE, "topk_method": "group_limited_greedy", "rope_parameters": YARN}),
    "v3": (V3, {**BASE, "rope_parameters": YARN}),
    "v3-other": (
        V3,
        {
            **BASE,
            "rope_interleave": False,
            "attention_bias": True,
            "v_head_dim": 16,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
}
WAYS = ["as the rule says", "up-projected", "absorbed"]


def make_deepseek(name: str, **config: Any) -> Any:
    """A random transformers model, its experts chosen by biases too."""
    architecture, settings = MODELS[name]
    model = make_reference(architecture, **settings | config)
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model


def make_latent_runner(folder: Path, device: str = "cpu", **flags: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "piecewise_cuda_graph_tokens": (8, 64, 128),
        "cuda_graph_bs": (1, 4),
        "chunked_prefill_size": 128,
        "max_total_tokens": 1024,
        "max_prefill_padding": 16.0,
    }
    return make_runner(folder, device, **settings | flags)


@dataclass
class Case:
    """A reference model, and a runner of its checkpoint."""

    reference: Any
    folder: Path
    runner: ModelRunner
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @property
    def backend(self) -> LatentPrefillBackend:
        assert isinstance(self.runner.attn_backend, LatentPrefillBackend)
        return self.runner.attn_backend

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The reference's, ``[tokens, vocab]``."""
        found = self.known.get(tuple(ids))
        if found is None:
            found = self.known[tuple(ids)] = self.reference(torch.tensor([ids])).logits[0]
            assert found.std() > 0.5  # else the tolerance would mean nothing
        return found

    def extend(
        self, requests: Requests, rows: Sequence[int], new: Sequence[Sequence[int]], **how: Any
    ) -> ForwardResult:
        """Run the next tokens of ``rows``; each must have the reference's logits."""
        targets = np.concatenate([np.asarray(ids) for ids in new]) * 7 % 97
        batch = requests.batch(rows, new, logprob_targets=targets)
        result = self.run(batch, **how)
        expected = [
            self.logits(requests.ids[row])[-len(ids) :] for row, ids in zip(rows, new, strict=True)
        ]
        last = torch.stack([logits[-1] for logits in expected])
        torch.testing.assert_close(result.next_token_logits, last, atol=1e-4, rtol=0)
        wanted = torch.cat(expected).log_softmax(-1).gather(1, torch.from_numpy(targets)[:, None])
        torch.testing.assert_close(
            result.input_token_logprobs, wanted.squeeze(1), atol=1e-4, rtol=0
        )
        return result

    def run(self, batch: ForwardBatch, *, replay: bool) -> ForwardResult:
        poison(self.runner)
        result = self.runner.forward(batch, allow_graph=replay)
        reason = DispatchReason.REPLAYED if replay else DispatchReason.EAGER_ASKED
        assert result.dispatch.reason is reason
        return result


def make_case(name: str, folder: Path) -> Case:
    reference = make_deepseek(name)
    save_checkpoint(reference, folder)
    return Case(reference, folder, make_latent_runner(folder))


def fresh(case: Case) -> Case:
    """With NaN in every cached row: what a request has not written, it must not use."""
    for cache in case.runner.kv_pool.tensors():
        cache.fill_(float("nan"))
    return case


def serve(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Serve all cached rows in one way."""
    if way != WAYS[0]:
        absorbed = way == "absorbed"
        monkeypatch.setattr(LatentShape, "prefers_absorbed", lambda *_: absorbed and _[2] > 0)
