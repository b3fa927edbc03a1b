"""Linears that take one input, as one matrix product over the weights where they are.

Weights become views of one tensor, so nothing is held twice; each stays the parameter it was, with
its values, for whoever else computes with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

ALIGNMENT = 16
"""Bytes at which each weight begins: what matrix products read at a time."""


class Products:
    """The products of one input with several ``linears``: one each, until ``pack``.

    Args:
        linears: one for each of ``sizes``, or one for all.
        sizes: features of each result.
    """

    def __init__(self, linears: Sequence[nn.Linear], sizes: Sequence[int]) -> None:
        self._linears, self._sizes = tuple(linears), list(sizes)
        self._packed: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """``[rows, size]`` for each size, rows strided, of ``x: [rows, in_features]``."""
        if self._packed is not None:
            return F.linear(x, *self._packed).split(self._sizes, dim=1)
        if len(self._linears) == 1:
            return self._linears[0](x).split(self._sizes, dim=1)
        return [linear(x) for linear in self._linears]

    def pack(self) -> None:
        """Make it one product, where the linears are nothing but a weight, and perhaps a bias."""
        linears = self._linears
        weights: list[torch.Tensor] = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        plain = all(type(linear) is nn.Linear and is_unhooked(linear) for linear in linears)
        alike = len(linears) > 1 and len(biases) in (0, len(linears))
        if plain and alike and _can_join(weights) and _can_join(biases):
            self._packed = joined(weights), joined(biases) if biases else None


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module is running the forward of its class."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and "forward" not in vars(module)


def joined(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of the rows of all ``parameters``, which become views of it if they are not."""
    if _lie_together(parameters):
        first = parameters[0].detach()
        rows = sum(len(parameter) for parameter in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.detach() for parameter in parameters])
    parts = whole.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return whole


def _can_join(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether they can become views: alike, aligned, and not views that somebody else made."""
    if not parameters:
        return True
    if any(one.is_inference() for one in parameters):  # torch lets nobody change what these are
        return False
    kinds = {(one.dtype, one.device, one.shape[1:]) for one in parameters}
    aligned = all(one.nbytes % ALIGNMENT == 0 and one.is_contiguous() for one in parameters)
    alone = all(one.untyped_storage().nbytes() == one.nbytes for one in parameters)
    distinct = len(set(map(id, parameters))) == len(parameters)
    return len(kinds) == 1 and aligned and distinct and (alone or _lie_together(parameters))


def _lie_together(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether each begins where the one before it ends, in one storage."""
    end = parameters[0].data_ptr()
    for one in parameters:
        same = one.untyped_storage()._cdata == parameters[0].untyped_storage()._cdata
        if not same or one.data_ptr() != end:
            return False
        end += one.nbytes
    return True
