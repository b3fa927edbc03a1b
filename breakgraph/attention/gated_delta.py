"""Gated delta rule: projections and gated norm are captured, convolution and rule are the break.

One product gives the convolution's channels, the output gate and the two gates of the rule side
by side; the kernels read their parts of it in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.attention.linear_attention import ExtendPlan, RadixLinearAttention, StepPlan
from breakgraph.distributed import Shard, equal_shard
from breakgraph.kernels.gated_delta import gated_delta_rule, gated_delta_step
from breakgraph.kernels.gated_delta_fla import require_gated_delta_kernels
from breakgraph.layers.linear import (
    CheckpointSlot,
    PackedLinear,
    RowLinear,
    row_slot,
    weight_parameter,
)
from breakgraph.layers.norm import GatedRMSNorm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GatedDeltaRule(RadixLinearAttention):
    """Causal convolution, then the delta rule with decay (Yang, Kautz & Hatamizadeh, 2024).

    Args:
        key_heads: this rank's, of ``key_dim`` elements; as many query heads.
        value_heads: this rank's, of ``value_dim`` elements; a multiple of ``key_heads``.
        kernel_size: of the convolution, over queries, keys and values.
    """

    float32_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        *,
        key_heads: Shard,
        key_dim: int,
        value_heads: Shard,
        value_dim: int,
        kernel_size: int,
    ) -> None:
        keys, values = key_heads.size * key_dim, value_heads.size * value_dim
        super().__init__(
            channels=(key_heads.of(key_dim), key_heads.of(key_dim), value_heads.of(value_dim)),
            kernel_size=kernel_size,
            conv_bias=False,
            state_shape=(value_heads.size, key_dim, value_dim),
            out_features=values,
        )
        self._value_heads = value_heads
        self._split = (keys, keys, values)
        self._key_dim, self._value_dim = key_dim, value_dim
        self.A_log = weight_parameter(value_heads.size)
        self.dt_bias = weight_parameter(value_heads.size)

    def checkpoint_slots(self) -> dict[str, CheckpointSlot]:
        """By checkpoint name beside this module."""
        named = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        slots = {n: row_slot(p.detach(), self._value_heads) for n, p in named.items()}
        return slots | self.conv_slots()

    def require_kernels(self) -> None:
        require_gated_delta_kernels()

    def lay_out(self, *projected_and_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *projected, out = projected_and_out
        mixed = torch.empty_like(projected[0])
        heads = self._heads(mixed)
        return (*projected, mixed, *heads, out.unflatten(1, (-1, self._value_dim)))

    def extend(self, plan: ExtendPlan, *tensors: torch.Tensor) -> None:
        channels, b, a, mixed, q, k, v, out = tensors
        self.convolve(plan, channels, mixed)
        gated_delta_rule(
            q,
            k,
            v,
            a,
            b,
            self.A_log,
            self.dt_bias,
            self.state,
            plan.cu_seqlens,
            plan.initial_slots,
            plan.final_slots,
            plan.chunks,
            plan.chunk_offsets,
            self.chunk_size,
            out,
        )

    def step(self, plan: StepPlan, *tensors: torch.Tensor) -> None:
        channels, b, a, mixed, q, k, v, out = tensors
        self.convolve(plan, channels, mixed)
        gated_delta_step(
            q,
            k,
            v,
            a,
            b,
            self.A_log,
            self.dt_bias,
            self.state,
            plan.slots,
            out,
        )

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``q`` and ``k: [rows, Hk, K]``, ``v: [rows, Hv, V]``, views of the convolved channels."""
        q, k, v = mixed.split(self._split, dim=1)
        key = (-1, self._key_dim)
        return q.unflatten(1, key), k.unflatten(1, key), v.unflatten(1, (-1, self._value_dim))


class GatedDeltaNet(nn.Module):
    """Input projection, recurrence, gated head norm and output projection.

    Without ``reduces``, ``forward`` gives this rank's part of a sum over the ranks.
    """

    def __init__(self, config: PreTrainedConfig, *, reduces: bool = True) -> None:
        super().__init__()
        key_heads = equal_shard(config.linear_num_key_heads, "linear_num_key_heads")
        value_heads = equal_shard(config.linear_num_value_heads, "linear_num_value_heads")
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values, hidden = (
            key_heads.size * key_dim,
            value_heads.of(value_dim),
            config.hidden_size,
        )
        shared = value_heads.size // key_heads.size
        sizes = [key_dim, key_dim, shared * value_dim, shared * value_dim]
        # A checkpoint has the rows of a key head and all that belongs to it together.
        self.in_proj = PackedLinear(
            hidden,
            {
                "in_proj_qkvz": key_heads.of(sum(sizes)),
                "in_proj_ba": key_heads.of(2 * shared),
            },
            orders={
                "in_proj_qkvz": _ungrouped(key_heads.size, sizes),
                "in_proj_ba": _ungrouped(key_heads.size, [shared] * 2),
            },
        )
        self._split = (2 * keys + values.size, values.size, value_heads.size, value_heads.size)
        self.recurrence = GatedDeltaRule(
            key_heads=key_heads,
            key_dim=key_dim,
            value_heads=value_heads,
            value_dim=value_dim,
            kernel_size=config.linear_conv_kernel_dim,
        )
        self.norm = GatedRMSNorm(value_dim, value_dim, config.rms_norm_eps, gate_first=False)
        self.out_proj = RowLinear(values, hidden, reduces=reduces)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the mixer's output for ``x`` to ``residual`` in place; both ``[rows, hidden]``."""
        channels, gate, b, a = self.in_proj(x).split(self._split, dim=1)
        return self.out_proj.add_to(residual, self.norm(self.recurrence(channels, b, a), gate))


def _ungrouped(groups: int, sizes: list[int]) -> torch.Tensor:
    """The order that puts the first part of all groups before the second of all, and so on."""
    with torch.device("cpu"):  # real numbers, also while the weights are on the meta device
        rows = torch.arange(groups * sum(sizes)).view(groups, -1)
        return torch.cat([part.flatten() for part in rows.split(sizes, dim=1)])
