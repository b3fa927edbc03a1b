"""Qwen3-Next: gated delta rule and gated attention, each with a mixture of experts behind it.

The residual stream is one tensor, copied from the inputs at the start of a forward and then
updated in place. Norms scale by one more than their weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.attention import Attention
from breakgraph.attention.gated_delta import GatedDeltaNet
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
    rotate_and_store,
)
from breakgraph.models.base import CausalLM, LayerStack, PrefillModel
from breakgraph.models.dense import is_sparse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GatedAttention(nn.Module):
    """Attention whose output is multiplied by the sigmoid of a gate, projected with the queries.

    Without ``reduces``, ``forward`` gives this rank's part of a sum over the ranks.
    """

    def __init__(self, config: PreTrainedConfig, *, reduces: bool = True) -> None:
        super().__init__()
        hidden, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        queries, keys = kv_shard(config.num_attention_heads, config.num_key_value_heads)
        heads, kv_heads = queries.size, keys.size
        self._heads, self._head_dim = [heads, heads, kv_heads, kv_heads], head_dim
        parts = {
            "q_proj": queries.of(2 * head_dim),
            "k_proj": keys.of(head_dim),
            "v_proj": keys.of(head_dim),
        }
        # A checkpoint has each head's query and gate together.
        with torch.device("cpu"):
            paired = torch.arange(heads * 2 * head_dim).view(heads, 2, head_dim)
        order = paired.transpose(0, 1).flatten()
        self.qkv_proj = PackedLinear(hidden, parts, bias=bias, orders={"q_proj": order})
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, offset=1.0)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, offset=1.0)
        self.attn = Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
        self.o_proj = RowLinear(queries.of(head_dim), hidden, bias=bias, reduces=reduces)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        out_cache_loc: torch.Tensor,
    ) -> torch.Tensor:
        projected = self.qkv_proj(x).unflatten(-1, (-1, self._head_dim))
        q, gate, k, v = projected.split(self._heads, dim=1)
        q, k = rotate_and_store(
            self.attn, q, k, v, cos_sin, out_cache_loc, self.q_norm, self.k_norm
        )
        mixed = self.attn.attend(q, k, v, out=q).mul_(gate.sigmoid())
        return self.o_proj.add_to(residual, mixed.flatten(1))


class Qwen3NextLayer(nn.Module):
    """A mixer, then the feed-forward block, each after a norm and added to the residual."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, offset=1.0)
        reduces = not (is_sparse(config, index) and current_group().scatters_rows)
        self.linear_attn = self.self_attn = None
        if config.layer_types[index] == "linear_attention":
            self.linear_attn = GatedDeltaNet(config, reduces=reduces)
        else:
            self.self_attn = GatedAttention(config, reduces=reduces)
        self.post_attention_layernorm = RMSNorm(hidden, eps, offset=1.0)
        self.mlp: QwenSparseMoe | GatedMLP
        if is_sparse(config, index):
            self.mlp = QwenSparseMoe(config)
        else:
            self.mlp = GatedMLP(hidden, config.intermediate_size)

    def forward(
        self, residual: torch.Tensor, cos_sin: torch.Tensor, inputs: LayerInputs
    ) -> torch.Tensor:
        x = self.input_layernorm(residual)
        if self.linear_attn is not None:
            residual = self.linear_attn(x, residual)
        elif self.self_attn is not None:
            residual = self.self_attn(x, residual, cos_sin, inputs.out_cache_loc)
        if isinstance(self.mlp, GatedMLP):
            return self.mlp(self.post_attention_layernorm(residual), residual)
        residual = self.mlp.scatter(residual)
        x = self.post_attention_layernorm(residual)
        return self.mlp(x, residual, inputs.num_token_non_padded, len(inputs.positions))


class Qwen3NextStack(LayerStack):
    """The layers and the final norm."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        _refuse_unsupported(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config, config.head_dim)
        self.layers = nn.ModuleList(
            Qwen3NextLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)

    def forward(self, inputs: LayerInputs) -> torch.Tensor:
        residual = inputs.hidden_states.clone()
        cos_sin = self.rotary(inputs.positions, residual.dtype)
        for layer in self.layers:
            residual = layer(residual, cos_sin, inputs)
        return self.norm(residual)


class Qwen3NextModel(PrefillModel):
    """Qwen3-Next without a head."""

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        return Qwen3NextStack(config)


class Qwen3NextForCausalLM(CausalLM, Qwen3NextModel):
    """Qwen3-Next."""


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; silu is")
    if "full_attention" not in config.layer_types:
        raise ValueError("a model without any full_attention layer is not supported")
