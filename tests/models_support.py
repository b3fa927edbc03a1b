"""Small random checkpoints in the Hugging Face format, and one eager forward over them.

Every weight is drawn wide, norms and biases too: with the initialisation of a fresh model, logits
are so near zero, and norms so near one, that a wrong model would pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from breakgraph.attention import Attention, TorchNativeBackend
from breakgraph.forward import ForwardBatch, LayerInputs, forward_context
from breakgraph.graph.cuda import pool_segments
from breakgraph.models import PrefillModel
from breakgraph.runner import ModelRunner

VOCAB = 97
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_reference(architecture: str, seed: int = 0, **config: Any) -> Any:
    """A random transformers model in float32, e.g. ``make_reference("Qwen3ForCausalLM")``."""
    model_class = getattr(transformers, architecture)
    settings = {**TINY, **config}
    model = model_class(model_class.config_class(**settings, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.25, generator=generator)
            if "norm" in name:
                parameter.add_(1)
    return model


def save_checkpoint(model: Any, folder: Path, **options: Any) -> Path:
    """Save a reference model; ``max_shard_size`` shards it."""
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Overwrite fields of ``config.json``; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@dataclass
class Slots:
    """KV caches bound to a model by hand, handing out slots from 1 in a shuffled order."""

    model: PrefillModel
    num_slots: int = 256
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        dtype = next(self.model.parameters()).dtype
        for layer in self.model.modules():
            if isinstance(layer, Attention):
                shape = (self.num_slots, layer.num_kv_heads, layer.head_dim)
                layer.k_cache = torch.zeros(shape, dtype=dtype)
                layer.v_cache = torch.zeros(shape, dtype=dtype)
        self._free = (np.random.default_rng(0).permutation(self.num_slots - 1) + 1).tolist()

    def take(self, count: int) -> list[int]:
        taken, self._free = self._free[:count], self._free[count:]
        return taken


def batch_inputs(hidden_states: torch.Tensor, batch: ForwardBatch) -> LayerInputs:
    """A batch's layer inputs, unpadded."""
    return LayerInputs(
        hidden_states=hidden_states,
        positions=torch.from_numpy(batch.positions),
        out_cache_loc=torch.from_numpy(batch.out_cache_loc),
        num_token_non_padded=torch.tensor([batch.num_tokens], dtype=torch.int32),
    )


@torch.no_grad()
def run_batch(model: PrefillModel, batch: ForwardBatch) -> torch.Tensor:
    """One eager forward; returns hidden states ``[num_tokens, hidden_size]``."""
    embeds = batch.input_embeds
    if embeds is None:
        embeds = model.embed(torch.from_numpy(batch.input_ids))
    backend = TorchNativeBackend(torch.device("cpu"))
    backend.init_forward_metadata(batch)
    with forward_context(batch, backend):
        return model.get_layer_stack()(batch_inputs(embeds, batch))


def run_prompts(
    model: PrefillModel, prompts: Sequence[Sequence[int]], prefix_lens: Sequence[int] = ()
) -> list[torch.Tensor]:
    """Each prompt's hidden states ``[tokens, hidden_size]``, all prompts packed in one forward.

    With ``prefix_lens``, that many tokens of each prompt run in a forward of their own before, and
    the second forward reads them from the cache.
    """
    slots = Slots(model)
    cached = [slots.take(prefix) for prefix in prefix_lens or [0] * len(prompts)]
    outputs: list[list[torch.Tensor]] = [[] for _ in prompts]

    def forward(
        indices: Sequence[int],
        part: Callable[[int], slice],
        new: Sequence[Sequence[int]],
        old: Sequence[Sequence[int]],
    ) -> None:
        ids = [prompts[i][part(i)] for i in indices]
        hidden = run_batch(model, ForwardBatch.from_requests(ids, new, old))
        for i, rows in zip(indices, hidden.split([len(one) for one in ids]), strict=True):
            outputs[i].append(rows)

    if some := [i for i, prefix in enumerate(cached) if prefix]:
        forward(some, lambda i: slice(len(cached[i])), [cached[i] for i in some], [()] * len(some))
    new = [slots.take(len(prompts[i]) - len(cached[i])) for i in range(len(prompts))]
    forward(range(len(prompts)), lambda i: slice(len(cached[i]), None), new, cached)
    return [torch.cat(parts) for parts in outputs]


def pools(runner: ModelRunner) -> list[torch.Tensor]:
    """Keys, values and states of all requests."""
    states = [] if runner.mamba_pool is None else runner.mamba_pool.tensors()
    return [*runner.kv_pool.tensors(), *states]


def make_noise(runner: ModelRunner) -> None:
    """Fill the pools with noise: what a request has not written, it must not use."""
    generator = torch.Generator(runner.device).manual_seed(0)
    for tensor in pools(runner):
        tensor.normal_(generator=generator)


def poison(runner: ModelRunner) -> None:
    """Fill the graphs' pool with NaN: what a replay reads, it must have written."""
    graphs = runner.graph_runners[0]
    if runner.device.type == "cpu":
        graphs.pool.poison()
        return
    for segment in pool_segments(graphs.pool):
        storage = torch._C._construct_storage_from_data_pointer(
            segment["address"], runner.device, segment["total_size"]
        )
        torch.empty(0, dtype=torch.uint8, device=runner.device).set_(storage).fill_(0xFF)


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths."""
    draw = np.random.default_rng(seed)
    return [draw.integers(1, VOCAB, length).tolist() for length in lengths]
