"""Small random hybrid models, and their requests with the states that a forward moves on.

Running a batch moves the states of its requests on, so to run one twice is to put them back
before: ``outcomes`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models_support import make_reference, poison, save_checkpoint

from breakgraph import Engine
from breakgraph.forward import ForwardBatch, ForwardMode
from breakgraph.runner import ForwardResult, ModelRunner
from breakgraph.server_args import ServerArgs

CONTEXT = 256
_COMMON = {"head_dim": 16, "max_position_embeddings": CONTEXT}
_NEMOTRON_H = {
    **_COMMON,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_hidden_layers": None,  # counted from the blocks
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "use_bias": True,
    "use_conv_bias": True,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
    "chunk_size": 16,
}
_QWEN3_NEXT = {
    **_COMMON,
    # The norm after the delta rule divides by what the query of a first token has in common with
    # its key, often next to nothing, and so would show how that was rounded.
    "rms_norm_eps": 1e-4,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "mlp_only_layers": [1],
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h": ("NemotronHForCausalLM", _NEMOTRON_H),
    # Steps of time as short as the least: with 0.001 no random projection would reach it.
    "nemotron_h-latent": (
        "NemotronHForCausalLM",
        {
            **_NEMOTRON_H,
            "layers_block_type": ["full_attention", "moe", "linear_attention", "mlp", "moe"],
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": False,
            "mlp_bias": True,
            "time_step_min": 0.3,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "moe_latent_size": 20,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_next": ("Qwen3NextForCausalLM", _QWEN3_NEXT),
    "qwen3_next-biased": (
        "Qwen3NextForCausalLM",
        {
            **_QWEN3_NEXT,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "linear_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "linear_num_value_heads": 2,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 3,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [],
            "norm_topk_prob": False,
        },
    ),
}


def make_hybrid(name: str, **config: Any) -> Any:
    """A random transformers model of ``HYBRIDS``, routed by biases too."""
    architecture, settings = HYBRIDS[name]
    model = make_reference(architecture, **settings | config)
    generator = torch.Generator().manual_seed(1)
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.5, generator=generator)
    return model


def save_hybrid(name: str, folder: Path, **config: Any) -> Path:
    return save_checkpoint(make_hybrid(name, **config), folder)


def make_hybrid_runner(folder: Path, **flags: Any) -> ModelRunner:
    """A runner without graphs unless ``flags`` ask for them."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "chunked_prefill_size": 160,
        "max_total_tokens": 1024,
        "max_running_requests": 16,
        "prefill_dispatch": "always",
        "max_prefill_padding": 16.0,
        "dtype": "float32",
    }
    return ModelRunner(ServerArgs(model_path=str(folder), **settings | flags))


def make_hybrid_engine(folder: Path, **flags: Any) -> Engine:
    """An engine for token ids alone, without graphs unless ``flags`` ask for them."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "skip_tokenizer_init": True,
        "chunked_prefill_size": 160,
        "max_total_tokens": 512,
        "max_running_requests": 8,
        "prefill_dispatch": "always",
        "max_prefill_padding": 16.0,
    }
    return Engine(model_path=str(folder), **settings | flags)


@dataclass
class Requests:
    """Requests in rows of ``runner.requests``, given back at the end of a ``with`` block.

    ``ids[row]`` are a request's tokens so far.
    """

    runner: ModelRunner
    ids: dict[int, list[int]] = field(default_factory=dict)

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self, count: int, prefix_lens: Sequence[int] = ()) -> list[int]:
        """Rows of new requests; those with a prefix have it in slots, of whatever lies there."""
        table = self.runner.requests
        rows = [table.acquire() for _ in range(count)]
        for row, prefix in zip(rows, prefix_lens or [0] * count, strict=True):
            self.ids[row] = [0] * prefix
            table.extend(row, prefix)
        return rows

    def batch(
        self,
        rows: Sequence[int],
        new: Sequence[Sequence[int]],
        mode: ForwardMode = ForwardMode.PREFILL,
        **fields: Any,
    ) -> ForwardBatch:
        """The next tokens of each of ``rows``."""
        table = self.runner.requests
        prefixes = [table.slots(row).copy() for row in rows]
        slots = [table.extend(row, len(ids)) for row, ids in zip(rows, new, strict=True)]
        for row, ids in zip(rows, new, strict=True):
            self.ids[row] += list(ids)
        where = np.asarray(rows, np.int64)
        return ForwardBatch.from_requests(new, slots, prefixes, mode=mode, rows=where, **fields)

    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> ForwardBatch:
        """One more token of each of ``rows``."""
        return self.batch(rows, [[int(token)] for token in tokens], ForwardMode.DECODE)

    def prefill(self, prompts: Sequence[Sequence[int]], **how: Any) -> tuple[list[int], Any]:
        """Run new requests; returns their rows and the logits after each."""
        rows = self.open(len(prompts))
        return rows, self.runner.forward(self.batch(rows, prompts), **how).next_token_logits

    def close(self, *rows: int) -> None:
        """Give back ``rows``, or all."""
        for row in rows or list(self.ids):
            self.runner.requests.release(row)
            del self.ids[row]


def states(runner: ModelRunner) -> list[torch.Tensor]:
    """Copies of all states."""
    assert runner.mamba_pool is not None
    return [tensor.clone() for tensor in runner.mamba_pool.tensors()]


def put_back(runner: ModelRunner, saved: Sequence[torch.Tensor]) -> None:
    """Set all states to copies made before."""
    assert runner.mamba_pool is not None
    for tensor, was in zip(runner.mamba_pool.tensors(), saved, strict=True):
        tensor.copy_(was)


@dataclass
class Outcome:
    """What one forward gave: logits, and all states after it."""

    result: ForwardResult
    logits: torch.Tensor
    states: list[torch.Tensor]


def outcomes(
    runner: ModelRunner, runs: Sequence[tuple[ForwardBatch, dict[str, Any]]]
) -> list[Outcome]:
    """Forwards, each from the states before the first, the graphs' pool full of NaN.

    Each must leave the slots of requests outside its batch bit for bit as they were.
    """
    before, found = states(runner), []
    assert runner.mamba_pool is not None
    for batch, how in runs:
        put_back(runner, before)
        if runner.graph_runner is not None:
            poison(runner)
        result = runner.forward(batch, **how)
        assert result.next_token_logits is not None
        found.append(Outcome(result, result.next_token_logits, states(runner)))
        mine = [runner.mamba_pool.reserved_slot, *([] if batch.rows is None else batch.rows)]
        others = np.setdiff1d(np.arange(runner.mamba_pool.num_slots), mine)
        for now, was in zip(found[-1].states, before, strict=True):
            assert torch.equal(now[others].view(torch.uint8), was[others].view(torch.uint8))
    return found
