"""Mixture-of-experts blocks that a graph segment can hold.

A block adds to the residual the weighted experts of each row and what every row gets, the shared
experts. Rows at or past ``num_token_non_padded`` are routed nowhere: the routed part of their
output is 0, and nothing they hold, NaN included, changes a real row.

With more than one rank each has some of the experts, and a share of every shared expert. All
route alike, and one sum over the ranks adds up what each has done. With ``--moe-scatter`` the
residual is divided by rows before the block's norm: each rank normalises and routes its own rows,
and ``num_token_non_padded`` counts those; the experts see the rows of all ranks, and what they
give goes back to the rank of each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.distributed import Shard, current_group
from breakgraph.layers.linear import Linear, RowLinear
from breakgraph.layers.mlp import GatedMLP, PlainMLP
from breakgraph.layers.moe_experts import GatedExperts, PlainExperts
from breakgraph.layers.moe_router import GroupedSoftmaxRouter, SigmoidRouter, SoftmaxRouter

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
        self.shared_expert = GatedMLP(hidden, shared, reduces=False) if shared else None
        self.shared_expert_gate = Linear(hidden, 1) if shared else None
        self._group = current_group()

    def scatter(self, residual: torch.Tensor) -> torch.Tensor:
        """What the norm and ``forward`` take, of a residual ``[rows, hidden]``.

        With ``--moe-scatter``, in which this is a part of a sum over the ranks, that is this rank's
        rows of the sum, else all rows.
        """
        return self._group.reduce_scatter(residual) if self._group.scatters_rows else residual

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        num_token_non_padded: torch.Tensor,
        rows: int | None = None,
    ) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual`` in place.

        Args:
            x: ``[rows, hidden]``, or this rank's rows as ``scatter`` gave them.
            residual: as ``x``.
            num_token_non_padded: int32 ``[1]``, how many leading rows are real.
            rows: how many rows there were before ``scatter``.

        Returns:
            ``residual``, of all rows.
        """
        if self._group.scatters_rows:
            return self._forward_scattered(x, residual, num_token_non_padded)[:rows]
        weights, experts = self.gate(x)
        self._group.begin_sum_(residual)
        residual.add_(self.experts(x, weights, experts, num_token_non_padded))
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            shared = self.shared_expert(x, torch.zeros_like(x))
            residual.addcmul_(shared, self.shared_expert_gate(x).sigmoid_())
        return self._group.all_reduce_(residual)

    def _forward_scattered(
        self, x: torch.Tensor, residual: torch.Tensor, num_token_non_padded: torch.Tensor
    ) -> torch.Tensor:
        weights, experts = self.gate(x)
        everyones = self._group.all_gather(x)
        mixed = self.experts.gathered(everyones, weights, experts, num_token_non_padded)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            shared = self.shared_expert(everyones, torch.zeros_like(everyones))
            mixed.addcmul_(shared, self.shared_expert_gate(everyones).sigmoid_())
        return self._group.all_gather(residual.add_(self._group.reduce_scatter(mixed)))


class NemotronHMoe(nn.Module):
    """The mixture of experts of NemotronH: relu² experts, behind latent projections or not.

    Raises:
        ValueError: the config asks for something else than relu², or for impossible routing.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        _require_activation("mlp_hidden_act", config.mlp_hidden_act, ("relu2",))
        _refuse_scatter()
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
        # On what this rank's experts gave: its outputs are added up, so its bias counts once.
        whole = Shard(latent or 0, 0, latent or 0)
        self.fc2_latent_proj = (
            RowLinear(whole, hidden, bias=bias, begins=False, reduces=False) if latent else None
        )
        shared = config.moe_shared_expert_intermediate_size
        self.shared_experts = PlainMLP(hidden, shared, bias=bias, reduces=False)
        self._group = current_group()

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, num_token_non_padded: torch.Tensor
    ) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual``, as ``QwenSparseMoe.forward`` does."""
        weights, experts = self.gate(x)
        latent = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        mixed = self.experts(latent, weights, experts, num_token_non_padded)
        self._group.begin_sum_(residual)
        if self.fc2_latent_proj is None:
            residual.add_(mixed)
        else:
            self.fc2_latent_proj.add_to(residual, mixed)
        return self._group.all_reduce_(self.shared_experts(x, residual))


class DeepseekMoe(nn.Module):
    """The sparse block of DeepSeek-V2 and V3: routed gated experts and shared ones.

    Args:
        config: its sizes.
        gate: the router.

    Raises:
        ValueError: the config asks for something else than SiLU.
    """

    def __init__(
        self, config: PreTrainedConfig, gate: GroupedSoftmaxRouter | SigmoidRouter
    ) -> None:
        super().__init__()
        _require_activation("hidden_act", config.hidden_act, ("silu", "swish"))
        _refuse_scatter()
        hidden, size = config.hidden_size, config.moe_intermediate_size
        self.gate = gate
        self.experts = GatedExperts(config.n_routed_experts, hidden, size)
        shared, bias = config.n_shared_experts, getattr(config, "mlp_bias", False)
        self.shared_experts = (
            GatedMLP(hidden, size * shared, bias=bias, reduces=False) if shared else None
        )
        self._group = current_group()

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, num_token_non_padded: torch.Tensor
    ) -> torch.Tensor:
        """Add the block's output for ``x`` to ``residual``, as ``QwenSparseMoe.forward`` does."""
        weights, experts = self.gate(x)
        self._group.begin_sum_(residual)
        residual.add_(self.experts(x, weights, experts, num_token_non_padded))
        if self.shared_experts is not None:
            residual = self.shared_experts(x, residual)
        return self._group.all_reduce_(residual)


def _refuse_scatter() -> None:
    if current_group().scatters_rows:
        raise ValueError("--moe-scatter is supported for Qwen3-MoE and Qwen3-Next; leave it out")


def _require_activation(field: str, given: str, supported: tuple[str, ...]) -> None:
    if given not in supported:
        raise ValueError(f"{field} {given!r} is not supported; {supported[0]} is")
