"""Mamba2: projections and gated norm are captured, convolution and scan are the break.

The input projection gives the gate, the convolution's channels and the time steps side by side;
the kernels read their parts of it in place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from breakgraph.attention.linear_attention import ExtendPlan, RadixLinearAttention, StepPlan
from breakgraph.distributed import Shard, equal_shard
from breakgraph.kernels.launch import import_triton
from breakgraph.kernels.mamba2 import mamba2_scan, mamba2_step
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


class Mamba2Recurrence(RadixLinearAttention):
    """Causal convolution, then the selective state space of each head (Dao & Gu, 2024).

    Args:
        heads: this rank's, H of ``head_dim`` P values.
        groups: this rank's, G that each share B and C of ``state_size`` N.
        kernel_size: of the convolution, over ``H * P + 2 * G * N`` channels.
        conv_bias: whether that has a bias.
        dt_limits: the least and the greatest time step.
    """

    chunk_size = 128
    float32_parameters = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        *,
        heads: Shard,
        head_dim: int,
        groups: Shard,
        state_size: int,
        kernel_size: int,
        conv_bias: bool,
        dt_limits: tuple[float, float],
    ) -> None:
        num_heads, inner, shared = heads.size, heads.size * head_dim, groups.size * state_size
        super().__init__(
            channels=(heads.of(head_dim), groups.of(state_size), groups.of(state_size)),
            kernel_size=kernel_size,
            conv_bias=conv_bias,
            state_shape=(num_heads, head_dim, state_size),
            out_features=inner,
        )
        self._split = (inner, shared, shared)
        self._heads_here = heads
        self._head_dim, self._state_size = head_dim, state_size
        self._dt_limits = dt_limits
        self.A_log = weight_parameter(num_heads)
        self.D = weight_parameter(num_heads)
        self.dt_bias = weight_parameter(num_heads)

    def checkpoint_slots(self) -> dict[str, CheckpointSlot]:
        """By checkpoint name beside this module."""
        named = {"A_log": self.A_log, "D": self.D, "dt_bias": self.dt_bias}
        slots = {n: row_slot(p.detach(), self._heads_here) for n, p in named.items()}
        return slots | self.conv_slots()

    def require_kernels(self) -> None:
        import_triton()

    def lay_out(self, *projected_and_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *projected, out = projected_and_out
        mixed = torch.empty_like(projected[0])
        heads = self._heads(mixed)
        return (*projected, mixed, *heads, out.unflatten(1, (-1, self._head_dim)))

    def extend(self, plan: ExtendPlan, *tensors: torch.Tensor) -> None:
        channels, dt, mixed, x, b, c, out = tensors
        self.convolve(plan, channels, mixed)
        mamba2_scan(
            x,
            b,
            c,
            dt,
            self.A_log,
            self.D,
            self.dt_bias,
            *self._dt_limits,
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
        channels, dt, mixed, x, b, c, out = tensors
        self.convolve(plan, channels, mixed)
        mamba2_step(
            x,
            b,
            c,
            dt,
            self.A_log,
            self.D,
            self.dt_bias,
            *self._dt_limits,
            self.state,
            plan.slots,
            out,
        )

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``x: [rows, H, P]``, ``B`` and ``C: [rows, G, N]``, views of the convolved channels."""
        x, b, c = mixed.split(self._split, dim=1)
        state = (-1, self._state_size)
        return x.unflatten(1, (-1, self._head_dim)), b.unflatten(1, state), c.unflatten(1, state)


class GroupedNorm(GatedRMSNorm):
    """The gated norm of this rank's groups."""

    def __init__(self, features: Shard, group_size: int, eps: float) -> None:
        super().__init__(features.size, group_size, eps)
        self._features = features

    def checkpoint_slot(self, name: str, tensor: torch.Tensor) -> CheckpointSlot:
        """Where this rank's part of the weight comes from."""
        return row_slot(tensor, self._features)


class Mamba2Mixer(nn.Module):
    """Input projection, recurrence, gated grouped norm and output projection."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        state, hidden, bias = config.ssm_state_size, config.hidden_size, config.use_bias
        heads = equal_shard(config.mamba_num_heads, "mamba_num_heads")
        groups = equal_shard(config.n_groups, "n_groups")
        inner, shared = heads.of(config.mamba_head_dim), groups.of(state)
        self._split = (inner.size, inner.size + 2 * shared.size, heads.size)
        parts = {"in_proj": (inner, inner, shared, shared, heads)}
        self.in_proj = PackedLinear(hidden, parts, bias=bias)
        self.recurrence = Mamba2Recurrence(
            heads=heads,
            head_dim=config.mamba_head_dim,
            groups=groups,
            state_size=state,
            kernel_size=config.conv_kernel,
            conv_bias=config.use_conv_bias,
            # transformers clamps so in a prefill, though not in its decode step; here both do.
            dt_limits=(config.time_step_min, math.inf),
        )
        self.norm = GroupedNorm(inner, inner.size // groups.size, config.layer_norm_epsilon)
        self.out_proj = RowLinear(inner, hidden, bias=bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add the mixer's output for ``x`` to ``residual`` in place; both ``[rows, hidden]``."""
        gate, channels, dt = self.in_proj(x).split(self._split, dim=1)
        return self.out_proj.add_to(residual, self.norm(self.recurrence(channels, dt), gate))
