"""NemotronH: blocks of one mixer each, in the order that the config names.

A block is Mamba2, attention without rotation, a relu² feed-forward or a mixture of experts; before
it a norm, and its output is added to the residual, one tensor that is updated in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.attention import Attention
from breakgraph.attention.mamba2 import Mamba2Mixer
from breakgraph.distributed import kv_shard
from breakgraph.forward import LayerInputs
from breakgraph.layers import Embedding, NemotronHMoe, PackedLinear, PlainMLP, RMSNorm, RowLinear
from breakgraph.models.base import CausalLM, LayerStack, PrefillModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class NemotronHAttention(nn.Module):
    """Fused q, k and v projection, attention and output projection; positions do not enter."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        queries, keys = kv_shard(config.num_attention_heads, config.num_key_value_heads)
        heads, kv_heads = queries.size, keys.size
        self._heads, self._head_dim = [heads, kv_heads, kv_heads], head_dim
        parts = {
            "q_proj": queries.of(head_dim),
            "k_proj": keys.of(head_dim),
            "v_proj": keys.of(head_dim),
        }
        self.qkv_proj = PackedLinear(hidden, parts)
        self.attn = Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
        self.o_proj = RowLinear(queries.of(head_dim), hidden)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, out_cache_loc: torch.Tensor
    ) -> torch.Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self._head_dim))
        q, k, v = qkv.split(self._heads, dim=1)
        return self.o_proj.add_to(residual, self.attn(q, k, v, out_cache_loc).flatten(1))


class NemotronHBlock(nn.Module):
    """A norm and the mixer of its kind."""

    def __init__(self, config: PreTrainedConfig, kind: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _mixer(config, kind)

    def forward(self, residual: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        x, mixer = self.norm(residual), self.mixer
        if isinstance(mixer, NemotronHAttention):
            return mixer(x, residual, inputs.out_cache_loc)
        if isinstance(mixer, NemotronHMoe):
            return mixer(x, residual, inputs.num_token_non_padded)
        return mixer(x, residual)


class NemotronHStack(LayerStack):
    """The blocks and the final norm."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        _refuse_unsupported(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NemotronHBlock(config, kind) for kind in config.layer_types)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, inputs: LayerInputs) -> torch.Tensor:
        residual = inputs.hidden_states.clone()
        for layer in self.layers:
            residual = layer(residual, inputs)
        return self.norm_f(residual)


class NemotronHModel(PrefillModel):
    """NemotronH without a head."""

    checkpoint_renames = (
        (r"^backbone\.", "model."),
        (r"^(model\.)?embeddings\.", "model.embed_tokens."),
    )

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        return NemotronHStack(config)


class NemotronHForCausalLM(CausalLM, NemotronHModel):
    """Nemotron-H and Nemotron 3."""


def _mixer(config: PreTrainedConfig, kind: str) -> nn.Module:
    if kind == "linear_attention":
        return Mamba2Mixer(config)
    if kind == "full_attention":
        return NemotronHAttention(config)
    if kind == "moe":
        return NemotronHMoe(config)
    if kind == "mlp":
        return PlainMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    raise ValueError(f"layers_block_type names a block of kind {kind!r}, which is not supported")


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    if config.mamba_hidden_act not in ("silu", "swish") or config.mlp_hidden_act != "relu2":
        raise ValueError(
            f"mamba_hidden_act {config.mamba_hidden_act!r} and mlp_hidden_act "
            f"{config.mlp_hidden_act!r} are not supported together; silu and relu2 are"
        )
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings is not supported: NemotronH has a head of its own")
    if config.residual_in_fp32:
        raise ValueError("residual_in_fp32 is not supported; set it to false")
    if "full_attention" not in config.layer_types:
        raise ValueError("a model without any attention block is not supported")
