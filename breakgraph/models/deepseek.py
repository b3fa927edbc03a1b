"""DeepSeek-V2 and V3: latent attention, and experts behind the first dense layers.

Checkpoints pair neighbouring elements of a head for rotation. Rows of the projections are put in
another order when they are loaded, first elements of the pairs before second ones, so that half is
rotated against half; products of queries and keys do not change by it. The residual stream is one
tensor, copied from the inputs at the start of a forward and then updated in place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.attention import LatentAttention, LatentShape
from breakgraph.distributed import Shard, equal_shard
from breakgraph.forward import LayerInputs
from breakgraph.layers import (
    DeepseekMoe,
    Embedding,
    GatedMLP,
    PackedLinear,
    RMSNorm,
    RotaryEmbedding,
    RowLinear,
)
from breakgraph.layers.moe_router import GroupedSoftmaxRouter, SigmoidRouter
from breakgraph.models.base import CausalLM, LayerStack, PrefillModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LATENT_NORM_EPS = 1e-6
"""Of the norms inside of attention, which no field of the config sets."""


class DeepseekAttention(nn.Module):
    """Projections to queries and latent rows, their norms and rotation, attention, output.

    Whatever reads the hidden states is one matrix product: the queries, or what they are made of
    if ``q_lora_rank`` is set, and the latent row. With more than one rank each has some of the
    heads; all make and keep the same latent rows.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        heads = equal_shard(config.num_attention_heads, "num_attention_heads")
        shape = LatentShape(
            num_heads=heads.size,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            rank=config.kv_lora_rank,
        )
        self.shape = shape
        with torch.device("cpu"):  # real numbers, also while the weights are on the meta device
            pairs = torch.arange(shape.rope_dim)
            if getattr(config, "rope_interleave", True):
                pairs = pairs.view(-1, 2).t().flatten()
            head = torch.cat([torch.arange(shape.nope_dim), shape.nope_dim + pairs])
            starts = torch.arange(shape.num_heads) * shape.qk_dim
            orders = {
                "kv_a_proj_with_mqa": torch.cat([torch.arange(shape.rank), shape.rank + pairs]),
                "q_proj": (starts[:, None] + head).flatten(),
            }
        queries, rank = heads.of(shape.qk_dim), config.q_lora_rank
        self.q_a_layernorm = self.q_up = None
        first: dict[str, int | Shard] = {"q_proj": queries}
        if rank is not None:
            first = {"q_a_proj": rank}
            self.q_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS)
            order = {"q_b_proj": orders["q_proj"]}
            self.q_up = PackedLinear(rank, {"q_b_proj": queries}, orders=order)
        parts = first | {"kv_a_proj_with_mqa": shape.row_dim}
        self.down_proj = PackedLinear(hidden, parts, bias=bias, orders=orders)
        self._widths = [rank or queries.size, shape.rank, shape.rope_dim]
        self.kv_a_layernorm = RMSNorm(shape.rank, LATENT_NORM_EPS)
        self.attn = LatentAttention(shape, heads, scale=_softmax_scale(config, shape.qk_dim))
        self.o_proj = RowLinear(heads.of(shape.value_dim), hidden, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        out_cache_loc: torch.Tensor,
    ) -> torch.Tensor:
        q, latent, k_rope = self.down_proj(x).split(self._widths, dim=1)
        if self.q_a_layernorm is not None and self.q_up is not None:
            q = self.q_up(self.q_a_layernorm(q))
        q = q.unflatten(1, (self.shape.num_heads, -1))
        q_rope = q[..., self.shape.nope_dim :]
        q_rope.copy_(_rotated(q_rope, cos_sin))
        k_rope = _rotated(k_rope.unsqueeze(1), cos_sin).squeeze(1)
        row = torch.cat([self.kv_a_layernorm(latent), k_rope], dim=1)
        return self.o_proj.add_to(residual, self.attn(q, row, out_cache_loc).flatten(1))


class DeepseekLayer(nn.Module):
    """Attention, then the feed-forward block, each after a norm and added to the residual."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = DeepseekAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp: GatedMLP | DeepseekMoe
        if index < config.first_k_dense_replace:
            bias = getattr(config, "mlp_bias", False)
            self.mlp = GatedMLP(hidden, config.intermediate_size, bias=bias)
        else:
            self.mlp = DeepseekMoe(config, _router(config))

    def forward(
        self, residual: torch.Tensor, cos_sin: torch.Tensor, inputs: LayerInputs
    ) -> torch.Tensor:
        x = self.input_layernorm(residual)
        residual = self.self_attn(x, residual, cos_sin, inputs.out_cache_loc)
        x = self.post_attention_layernorm(residual)
        if isinstance(self.mlp, GatedMLP):
            return self.mlp(x, residual)
        return self.mlp(x, residual, inputs.num_token_non_padded)


class DeepseekStack(LayerStack):
    """The decoder layers and the final norm."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        _refuse_unsupported(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config, config.qk_rope_head_dim)
        self.layers = nn.ModuleList(
            DeepseekLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs: LayerInputs) -> torch.Tensor:
        residual = inputs.hidden_states.clone()
        cos_sin = self.rotary(inputs.positions, residual.dtype)
        for layer in self.layers:
            residual = layer(residual, cos_sin, inputs)
        return self.norm(residual)


class DeepseekV2Model(PrefillModel):
    """DeepSeek-V2 without a head."""

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        return DeepseekStack(config)


class DeepseekV3Model(PrefillModel):
    """DeepSeek-V3 without a head.

    Checkpoints may have further layers behind the last, which predict more than one token.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        count = config.num_hidden_layers
        further = "|".join(str(count + i) for i in range(config.num_nextn_predict_layers or 0))
        if further:
            self.checkpoint_renames = ((rf"^(model\.)?layers\.({further})\.", "mtp."),)

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        return DeepseekStack(config)


class DeepseekV2ForCausalLM(CausalLM, DeepseekV2Model):
    """DeepSeek-V2, V2-Lite and V2.5."""


class DeepseekV3ForCausalLM(CausalLM, DeepseekV3Model):
    """DeepSeek-V3 and R1."""


def _rotated(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """``x: [rows, heads, rope_dim]``, half rotated against half by ``cos_sin``, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos_sin.float().unsqueeze(1).unbind(2)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(turned, dim=-1).to(x.dtype)


def _softmax_scale(config: PreTrainedConfig, qk_dim: int) -> float:
    """``qk_dim ** -0.5``, and YaRN's square of ``mscale_all_dim`` (Peng et al., 2023)."""
    rope, scale = config.rope_parameters, qk_dim**-0.5
    all_dim = rope.get("mscale_all_dim") or 0
    if rope.get("rope_type", "default") == "default" or not all_dim or rope["factor"] <= 1:
        return float(scale)
    return float(scale * (0.1 * all_dim * math.log(rope["factor"]) + 1.0) ** 2)


def _router(config: PreTrainedConfig) -> GroupedSoftmaxRouter | SigmoidRouter:
    sizes = (config.hidden_size, config.n_routed_experts, config.num_experts_per_tok)
    if config.model_type == "deepseek_v2":
        grouped = config.topk_method == "group_limited_greedy"
        return GroupedSoftmaxRouter(
            *sizes,
            num_groups=config.n_group if grouped else 1,
            groups_kept=config.topk_group if grouped else 1,
            scale=config.routed_scaling_factor,
        )
    return SigmoidRouter(
        *sizes,
        num_groups=config.n_group or 1,
        groups_kept=config.topk_group or 1,
        renormalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


def _refuse_unsupported(config: PreTrainedConfig) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; silu is")
    if config.attention_bias and config.q_lora_rank is None:
        raise ValueError("attention_bias is not supported where q_lora_rank is null")
    if getattr(config, "moe_layer_freq", 1) != 1:
        raise ValueError(
            f"moe_layer_freq {config.moe_layer_freq} is not supported: every layer from "
            "first_k_dense_replace on has experts"
        )
    if config.model_type != "deepseek_v2":
        return
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"topk_method {config.topk_method!r} is not supported; greedy and "
            "group_limited_greedy are"
        )
    if config.norm_topk_prob:
        raise ValueError("norm_topk_prob is not supported for DeepSeek-V2; set it to false")
