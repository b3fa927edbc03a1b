"""Linear layers: one weight for every projection of the same input.

A fused weight is filled from several checkpoint tensors. Which ones, and which rows each
fills, the layer itself says in ``checkpoint_slots``, so the weight loader knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, slots=True)
class CheckpointSlot:
    """Where a checkpoint tensor of ``shape`` is copied; ``target`` may repeat it.

    With ``order``, int64 ``[rows]``, row ``i`` of the target is row ``order[i]`` of the tensor.
    """

    target: torch.Tensor
    shape: tuple[int, ...]
    order: torch.Tensor | None = None


def weight_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter that takes no gradient."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Linear(nn.Module):
    """``y = x @ weight.T + bias``, with ``weight: [out_features, in_features]``."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = weight_parameter(out_features, in_features)
        self.bias = weight_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[rows, in_features]`` to ``[rows, out_features]``."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the output for ``x`` to ``residual`` in place, inside the matrix product.

        On an H200 in bfloat16, at 16 tokens, 5.7 µs against 6.7 with an addition of its own for
        a 2048 to 1024 projection, 29.0 against 30.1 for 12288 to 4096; never slower up to 4096.

        Args:
            residual: ``[rows, out_features]``, a tensor made in this forward.
            x: ``[rows, in_features]``.

        Returns:
            ``residual``. The sum is rounded once, from float32.
        """
        residual.addmm_(x, self.weight.t())
        if self.bias is not None:
            residual.add_(self.bias)
        return residual


class PackedLinear(Linear):
    """Several projections of one input as a single matrix product.

    ``parts`` gives each projection's checkpoint name and its output features, in row order;
    ``orders`` those whose rows the checkpoint has in another order, see ``CheckpointSlot``.
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool = False,
        orders: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self._parts, self._orders = dict(parts), dict(orders)

    def checkpoint_slots(self) -> dict[str, CheckpointSlot]:
        """The rows of each projection, by checkpoint name beside this layer."""
        slots = {}
        for kind, parameter in self.named_parameters():
            pieces = parameter.detach().split(list(self._parts.values()))
            for part, rows in zip(self._parts, pieces, strict=True):
                order = self._orders.get(part)
                slots[f"{part}.{kind}"] = CheckpointSlot(rows, tuple(rows.shape), order)
        return slots
