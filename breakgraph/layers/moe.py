"""Mixture-of-experts blocks that a graph segment can hold.

A block adds to the residual the weighted experts of each row and what every row gets, the shared
experts. Rows at or past ``num_token_non_padded`` are routed nowhere: the routed part of their
output is 0, and nothing they hold, NaN included, changes a real row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.layers.linear import Linear
from breakgraph.layers.mlp import GatedMLP, PlainMLP
from breakgraph.layers.moe_experts import GatedExperts, PlainExperts
from breakgraph.layers.moe_router import SigmoidRouter, SoftmaxRouter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class QwenSparseMoe(nn.Module):
    """The sparse block of Qwen3-MoE and, with a gated shared expert, of Qwen3-Next.

    The shared expert is there if the config gives it a ``shared_expert_intermediate_size``.

    Raises:
        ValueError: the config asks for something else than SiLU, or for impossible routing.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        _require_activation("hidden_act", config.hidden_act, ("silu", "swish"))
        hidden, count = config.hidden_size, config.num_experts
        self.gate = SoftmaxRouter(
            hidden, count, config.num_experts_per_tok, renormalize=config.norm_topk_prob
        )
        self.experts = GatedExperts(count, hidden, config.moe_intermediate_size)
        shared = getattr(config, "shared_expert_intermediate_size", 0)
        self.shared_expert = GatedMLP(hidden, shared) if shared else None
        self.shared_expert_gate = Linear(hidden, 1) if shared else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, num_token_non_padded: torch.Tensor
    ) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual`` in place.

        Args:
            x: ``[rows, hidden]``.
            residual: ``[rows, hidden]``.
            num_token_non_padded: int32 ``[1]``, how many leading rows are real.

        Returns:
            ``residual``.
        """
        weights, experts = self.gate(x)
        residual.add_(self.experts(x, weights, experts, num_token_non_padded))
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            shared = self.shared_expert(x, torch.zeros_like(x))
            residual.addcmul_(shared, self.shared_expert_gate(x).sigmoid_())
        return residual


class NemotronHMoe(nn.Module):
    """The mixture of experts of NemotronH: relu² experts, behind latent projections or not.

    Raises:
        ValueError: the config asks for something else than relu², or for impossible routing.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        _require_activation("mlp_hidden_act", config.mlp_hidden_act, ("relu2",))
        hidden, count, latent = config.hidden_size, config.n_routed_experts, config.moe_latent_size
        self.gate = SigmoidRouter(
            hidden,
            count,
            config.num_experts_per_tok,
            num_groups=config.n_group,
            groups_kept=config.topk_group,
            renormalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        self.experts = PlainExperts(count, latent or hidden, config.moe_intermediate_size)
        bias = config.mlp_bias
        self.fc1_latent_proj = Linear(hidden, latent, bias=bias) if latent else None
        self.fc2_latent_proj = Linear(latent, hidden, bias=bias) if latent else None
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = PlainMLP(hidden, shared, bias=bias)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, num_token_non_padded: torch.Tensor
    ) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual``, as ``QwenSparseMoe.forward`` does."""
        weights, experts = self.gate(x)
        latent = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        mixed = self.experts(latent, weights, experts, num_token_non_padded)
        if self.fc2_latent_proj is None:
            residual.add_(mixed)
        else:
            self.fc2_latent_proj.add_to(residual, mixed)
        return self.shared_experts(x, residual)


def _require_activation(field: str, given: str, supported: tuple[str, ...]) -> None:
    if given not in supported:
        raise ValueError(f"{field} {given!r} is not supported; {supported[0]} is")
