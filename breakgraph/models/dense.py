"""Llama, Qwen2, Qwen3 and Qwen3-MoE: one decoder, told apart by a ``DenseVariant``.

The residual stream is one tensor, copied from the inputs at the start of a forward and then
updated in place by the output projections, whose matrix products do the addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.attention import Attention
from breakgraph.distributed import current_group, kv_shard
from breakgraph.forward import LayerInputs
from breakgraph.layers import (
    Embedding,
    GatedMLP,
    PackedLinear,
    QwenSparseMoe,
    RMSNorm,
    RotaryEmbedding,
    RowLinear,
    split_rotate_and_store,
)
from breakgraph.models.base import CausalLM, LayerStack, PrefillModel, SequenceClassifier

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseVariant:
    """What tells one dense architecture from another."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: bool = False


class DenseAttention(nn.Module):
    """Fused q, k and v projection, head norm, rotation, attention and output projection.

    Without ``reduces``, ``forward`` gives this rank's part of a sum over the ranks.
    """

    def __init__(
        self, config: PreTrainedConfig, variant: DenseVariant, *, reduces: bool = True
    ) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, head_size(config)
        queries, keys = kv_shard(config.num_attention_heads, config.num_key_value_heads)
        heads, kv_heads = queries.size, keys.size
        parts = {
            "q_proj": queries.of(head_dim),
            "k_proj": keys.of(head_dim),
            "v_proj": keys.of(head_dim),
        }
        self.qkv_proj = PackedLinear(hidden, parts, bias=variant.qkv_bias)
        self.q_norm = self.k_norm = None
        if variant.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.attn = Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
        bias = variant.output_bias
        self.o_proj = RowLinear(queries.of(head_dim), hidden, bias=bias, reduces=reduces)

    def forward(
        self,
        norm: RMSNorm,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        out_cache_loc: torch.Tensor,
    ) -> torch.Tensor:
        x, eps = norm.deferred(residual)
        qkv = self.qkv_proj(x)
        del x  # the queries take its memory: 67 MB of 8192 rows of Qwen3-8B
        q, k, v = split_rotate_and_store(
            *(self.attn, qkv, cos_sin, out_cache_loc, self.q_norm, self.k_norm, residual, eps)
        )
        return self.o_proj.add_to(residual, self.attn.attend(q, k, v, out=q).flatten(1))


class DenseLayer(nn.Module):
    """Attention, then the feed-forward block, each after a norm and added to the residual."""

    def __init__(self, config: PreTrainedConfig, variant: DenseVariant, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        sparse = variant.experts and is_sparse(config, index)
        scattered = sparse and current_group().scatters_rows
        self.self_attn = DenseAttention(config, variant, reduces=not scattered)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp: GatedMLP | QwenSparseMoe
        if sparse:
            self.mlp = QwenSparseMoe(config)
        else:
            self.mlp = GatedMLP(hidden, config.intermediate_size, bias=variant.mlp_bias)

    def fold_norms(self) -> None:
        """Make the norms' weights part of the products behind them, where one alone is there."""
        self.input_layernorm.fold_into(self.self_attn.qkv_proj)
        if isinstance(self.mlp, GatedMLP):
            self.post_attention_layernorm.fold_into(self.mlp.gate_up_proj)

    def forward(
        self, residual: torch.Tensor, cos_sin: torch.Tensor, inputs: LayerInputs
    ) -> torch.Tensor:
        residual = self.self_attn(self.input_layernorm, residual, cos_sin, inputs.out_cache_loc)
        if isinstance(self.mlp, GatedMLP):
            rows = self.mlp.gate_up_proj.gated_rows
            x, eps = self.post_attention_layernorm.deferred(residual, below=rows)
            return self.mlp(x, residual, eps)
        residual = self.mlp.scatter(residual)
        x = self.post_attention_layernorm(residual)
        return self.mlp(x, residual, inputs.num_token_non_padded, len(inputs.positions))


class DenseStack(LayerStack):
    """The decoder layers and the final norm."""

    def __init__(self, config: PreTrainedConfig, variant: DenseVariant) -> None:
        super().__init__()
        _refuse_unsupported(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config, head_size(config))
        self.layers = nn.ModuleList(
            DenseLayer(config, variant, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs: LayerInputs) -> torch.Tensor:
        residual = inputs.hidden_states.clone()
        cos_sin = self.rotary(inputs.positions, residual.dtype)
        for layer in self.layers:
            residual = layer(residual, cos_sin, inputs)
        return self.norm(residual)


class LlamaModel(PrefillModel):
    """Llama without a head."""

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        bias = config.attention_bias
        variant = DenseVariant(qkv_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)
        return DenseStack(config, variant)


class Qwen2Model(PrefillModel):
    """Qwen2 and Qwen2.5 without a head."""

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        return DenseStack(config, DenseVariant(qkv_bias=True))


class Qwen3Model(PrefillModel):
    """Qwen3 without a head."""

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        bias = config.attention_bias
        return DenseStack(config, DenseVariant(qkv_bias=bias, output_bias=bias, qk_norm=True))


class Qwen3MoeModel(PrefillModel):
    """Qwen3-MoE without a head."""

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        bias = config.attention_bias
        variant = DenseVariant(qkv_bias=bias, output_bias=bias, qk_norm=True, experts=True)
        return DenseStack(config, variant)


class LlamaForCausalLM(CausalLM, LlamaModel):
    """Llama 2, 3, 3.1 and 3.2."""


class Qwen2ForCausalLM(CausalLM, Qwen2Model):
    """Qwen2 and Qwen2.5."""


class Qwen3ForCausalLM(CausalLM, Qwen3Model):
    """Qwen3."""


class Qwen3MoeForCausalLM(CausalLM, Qwen3MoeModel):
    """Qwen3 with a mixture of experts."""


class LlamaForSequenceClassification(SequenceClassifier, LlamaModel):
    """Llama with a score for each label."""


class Qwen2ForSequenceClassification(SequenceClassifier, Qwen2Model):
    """Qwen2 with a score for each label."""


class Qwen3ForSequenceClassification(SequenceClassifier, Qwen3Model):
    """Qwen3 with a score for each label."""


def is_sparse(config: PreTrainedConfig, index: int) -> bool:
    """Whether layer ``index`` of a Qwen config has experts."""
    stepped = config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
    return stepped and index not in config.mlp_only_layers


def head_size(config: PreTrainedConfig) -> int:
    """Elements of an attention head; Qwen2 configs leave it out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; silu is")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "only rotation of whole heads is supported, but partial_rotary_factor is "
            f"{config.rope_parameters['partial_rotary_factor']}"
        )
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if slides and config.sliding_window < config.max_position_embeddings:
        raise ValueError(
            f"sliding-window attention is not supported, and use_sliding_window asks for a window "
            f"of {config.sliding_window} in a context of {config.max_position_embeddings}; "
            "set use_sliding_window to false to attend to the whole context instead"
        )
