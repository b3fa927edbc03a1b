"""Experts as stacked weights, run on the rows that were routed to them.

Shapes depend on the number of rows alone. Which rows an expert gets is a permutation and a row of
offsets, both on the device, so a captured dispatch serves every later routing. Assignments of
padded rows (at or past ``num_token_non_padded``) sort behind the last offset: no expert reads
them, and what the grouped products leave there, uninitialised memory, reaches no real row. With
more than one rank each has some of the experts, and what goes to another rank's sorts there too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from breakgraph.distributed import current_group, equal_shard
from breakgraph.kernels.pointwise import relu_squared_, silu_mul
from breakgraph.layers.linear import CheckpointSlot, weight_parameter

_ALIGNMENT = 16
"""Bytes that the rows of a grouped product's operands must be a multiple of."""

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Dispatch(NamedTuple):
    """Assignments (row, choice) in the order of their experts, padded rows last.

    Attributes:
        order: int64 ``[rows * top_k]``, the assignment, ``row * top_k + choice``, sorted to each
            place.
        rows: int64 ``[rows * top_k]``, its row.
        offsets: int32 ``[num_experts]``, where each expert's assignments end.
        places: int64 ``[rows, top_k]``, where each assignment of a row was sorted to.
    """

    order: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    places: torch.Tensor


def sort_by_expert(experts: torch.Tensor, live: torch.Tensor, num_experts: int) -> Dispatch:
    """Sort assignments by expert, and by row within an expert.

    Args:
        experts: int64 ``[rows, top_k]``.
        live: bool ``[rows]`` or ``[rows, top_k]``, False for padding and for other ranks' experts.
        num_experts: also the expert that what is not live is sorted as.
    """
    live = live.unsqueeze(1) if live.dim() == 1 else live
    # A radix sort reads its keys once a byte: int16 is a quarter of the passes of int64.
    keys = torch.where(live, experts, num_experts).to(torch.int16).flatten()
    ordered, order = keys.sort(stable=True)
    ids = torch.arange(num_experts, dtype=torch.int16, device=keys.device)
    offsets = torch.searchsorted(ordered, ids, right=True, out_int32=True)
    positions = torch.arange(len(order), device=keys.device)
    places = torch.empty_like(order).scatter_(0, order, positions)
    rows = order.div(experts.shape[1], rounding_mode="floor")
    return Dispatch(order, rows, offsets, places.view_as(experts))


class Experts(nn.Module, ABC):
    """``num_experts`` feed-forward blocks of one shape, this rank's of them in two stacked weights.

    ``up: [num_experts, len(parts) * intermediate_size, size]`` and
    ``down: [num_experts, size, intermediate_size]``, divided by the number of ranks.
    """

    parts: ClassVar[tuple[str, ...]]
    """Checkpoint names of the projections in ``up``, in row order."""

    def __init__(self, num_experts: int, size: int, intermediate_size: int) -> None:
        super().__init__()
        if num_experts >= torch.iinfo(torch.int16).max:
            raise ValueError(f"{num_experts} experts are more than the 32766 that are supported")
        self._group = current_group()
        self._shard = here = equal_shard(num_experts, "the number of experts")
        self.up = weight_parameter(here.size, len(self.parts) * intermediate_size, size)
        self.down = weight_parameter(here.size, size, intermediate_size)

    @abstractmethod
    def activate(self, projected: torch.Tensor) -> torch.Tensor:
        """``[n, len(parts) * intermediate_size]`` to ``[n, intermediate_size]``."""

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        num_token_non_padded: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of each row's experts, of those that this rank has.

        Args:
            x: ``[rows, size]``; padded rows may hold anything.
            weights: ``[rows, top_k]``.
            experts: int64 ``[rows, top_k]``, different ones in a row.
            num_token_non_padded: int32 ``[1]``, how many leading rows are real.

        Returns:
            ``[rows, size]``, exactly 0 in padded rows.
        """
        live = torch.arange(len(x), device=x.device) < num_token_non_padded
        return self._of_live(x, weights, experts, live)

    def gathered(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        num_token_non_padded: torch.Tensor,
    ) -> torch.Tensor:
        """``forward`` where each rank gives routed rows of its own, for the rows of all ranks.

        Args:
            x: ``[size * rows, size]``, gathered from the ranks.
            weights: ``[rows, top_k]``, of this rank's rows.
            experts: int64 ``[rows, top_k]``, of this rank's rows.
            num_token_non_padded: int32 ``[1]``, how many leading rows of this rank are real.
        """
        live = torch.arange(len(weights), device=x.device) < num_token_non_padded
        nowhere = self._shard.total
        experts = self._group.all_gather(torch.where(live[:, None], experts, nowhere))
        weights = self._group.all_gather(weights)
        return self._of_live(x, weights, experts, experts[:, 0] < nowhere)

    def _of_live(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, live: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum for the rows that are ``live``, bool ``[rows]``; 0 in others."""
        # Not a product with 0: a padded row may be NaN by now.
        return torch.where(live[:, None], self._mix(x, weights, experts, live), 0)

    def _mix(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, live: torch.Tensor
    ) -> torch.Tensor:
        here, first = None, self._shard.begin
        if self._shard.size < self._shard.total:
            here = live[:, None] & (experts >= first) & (experts < self._shard.end)
        if not (_can_group(x, self.up) and _can_group(x, self.down)):
            return self._every_expert(x, weights, experts)
        if here is None:
            return self._grouped(x, weights, sort_by_expert(experts, live, len(self.up)))
        dispatch = sort_by_expert(experts - first, here, len(self.up))
        return self._grouped(x, weights, dispatch, here)

    def _grouped(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        dispatch: Dispatch,
        here: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each expert on its own rows; anything in padded rows.

        ``here``, bool ``[rows, top_k]``, are the assignments to this rank's experts; None is all.

        The weights go in before the last product, where a row is narrowest, so that what remains
        is a gather and a sum, which take 66 µs for 2048 rows of 2048 with 8 experts on an H200;
        an ``embedding_bag`` takes 131, a gather and a batched product 174.
        """
        order, rows, offsets, places = dispatch
        hidden = self.activate(_grouped_product(x.index_select(0, rows), self.up, offsets))
        hidden.mul_(weights.flatten().index_select(0, order).unsqueeze(1))
        routed = _grouped_product(hidden, self.down, offsets)
        chosen = routed.index_select(0, places.flatten()).view(*places.shape, -1)
        if here is not None:
            chosen.masked_fill_(~here.unsqueeze(-1), 0)
        return chosen.sum(1)

    def _every_expert(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """The same through every expert for every row: slow, but served on any device and dtype."""
        # One more: the expert that padded rows of other ranks come routed to.
        shares = weights.new_zeros(len(x), self._shard.total + 1).scatter_(1, experts, weights)
        chosen = torch.zeros_like(shares, dtype=torch.bool).scatter_(1, experts, True)
        shares, chosen = shares[:, self._shard.range], chosen[:, self._shard.range]
        mixed = torch.zeros_like(x, dtype=torch.float32)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            routed = F.linear(self.activate(F.linear(x, up)), down)
            share = routed * shares[:, expert, None]
            mixed += torch.where(chosen[:, expert, None], share, 0)
        return mixed.to(x.dtype)

    def checkpoint_slots(self) -> dict[str, CheckpointSlot]:
        """The rows of each expert's projections, by checkpoint name beside these experts."""
        slots = {}
        ups, downs = self.up.detach(), self.down.detach()
        for expert in range(self._shard.total):
            mine = self._shard.begin <= expert < self._shard.end
            place = expert - self._shard.begin if mine else 0
            named = dict(zip(self.parts, ups[place].chunk(len(self.parts)), strict=True))
            for part, rows in (named | {"down_proj": downs[place]}).items():
                name = f"experts.{expert}.{part}.weight"
                slots[name] = CheckpointSlot(rows if mine else None, tuple(rows.shape))
        return slots


class GatedExperts(Experts):
    """``down(silu(gate(x)) * up(x))`` each."""

    parts = ("gate_proj", "up_proj")

    def activate(self, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return silu_mul(gate, up)


class PlainExperts(Experts):
    """``down(relu(up(x))²)`` each."""

    parts = ("up_proj",)

    def activate(self, projected: torch.Tensor) -> torch.Tensor:
        return relu_squared_(projected)


def _grouped_product(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each group of rows times its weight; uninitialised behind the last offset.

    ``x: [n, in_features]``, ``weight: [groups, out_features, in_features]``.
    """
    return F.grouped_mm(x, weight.mT, offs=offsets)


def _can_group(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``grouped_mm`` takes this product without waiting for the device.

    On CUDA it has a kernel for bfloat16 on compute capability 9 and 10; for all else it reads the
    offsets back and loops over the groups.
    """
    if any(size * weight.element_size() % _ALIGNMENT for size in weight.shape[1:]):
        return False
    if not x.is_cuda:
        return x.dtype in _CPU_DTYPES
    major, _ = torch.cuda.get_device_capability(x.device)
    return x.dtype == torch.bfloat16 and major in (9, 10)
