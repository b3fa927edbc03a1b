"""Modules of a class that map rows to rows, found by what they do in one short forward.

Of such a module nothing is known but what it was called with; whoever puts something in its place
compares the two on inputs drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from breakgraph.models.transformers_impl.record import record_calls

if TYPE_CHECKING:
    from breakgraph.models.transformers_impl.model import Parts

PROBE_ROWS = 23
"""Rows to find token-wise parts with: prime, so that no other dimension is taken for them."""


@dataclass(frozen=True, slots=True)
class Part:
    """A token-wise module.

    Attributes:
        module: of the class.
        inputs: shape and type of each.
        row_dim: the dimension of all of them that the rows are: 1, or 2 behind heads.
    """

    module: nn.Module
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    row_dim: int

    def draw(self, rows: int, device: torch.device, scale: float = 1.0) -> list[torch.Tensor]:
        """Normally distributed inputs, the same at each call."""
        generator = torch.Generator(device).manual_seed(0)
        drawn = []
        for shape, dtype in self.inputs:
            sizes = (*shape[: self.row_dim], rows, *shape[self.row_dim + 1 :])
            one = torch.randn(sizes, dtype=dtype, device=device, generator=generator)
            drawn.append(one.mul_(scale))
        return drawn


def token_wise_parts(parts: Parts, also: tuple[type[nn.Module], ...] = ()) -> dict[nn.Module, Part]:
    """The modules that were called with tensors of rows alone and gave one such tensor.

    Seen in one forward over ``PROBE_ROWS`` rows. A module with attention or experts in it is none,
    nor one that changes its inputs, nor one of torch's own, which are a kernel each, but for those
    of the types ``also``.
    """
    seen: dict[nn.Module, Part] = {}
    excluded = _excluded(parts)
    hooks = []

    def watch(module: nn.Module) -> None:
        versions: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            versions[:] = [tensor._version for tensor in args if isinstance(tensor, torch.Tensor)]

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            dims = [dim for dim in (1, 2) if all(_has_rows(one, dim) for one in (*args, output))]
            if kwargs or not args or not dims:
                return
            storages = {tensor.untyped_storage()._cdata for tensor in args}
            same = output.untyped_storage()._cdata in storages
            if not same and versions == [tensor._version for tensor in args]:
                seen[module] = Part(module, tuple((t.shape, t.dtype) for t in args), dims[0])

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))

    for module in parts.decoder.modules():
        of_torch = type(module).__module__.startswith("torch.nn.")
        if module not in excluded and (not of_torch or isinstance(module, also)):
            watch(module)
    try:
        weight = parts.embedding.weight
        embeds = torch.randn(
            *(1, PROBE_ROWS, parts.hidden_size),
            dtype=weight.dtype,
            device=weight.device,
            generator=torch.Generator(weight.device).manual_seed(0),
        )
        positions = torch.arange(PROBE_ROWS, device=weight.device).unsqueeze(0)
        arguments = {**parts.arguments, "position_ids": positions}
        record_calls(parts.decoder, parts.switches, embeds, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _excluded(parts: Parts) -> set[nn.Module]:
    """Modules with attention in them, with a weight of three dimensions (experts, convolutions), or
    whose forward somebody has replaced."""
    stops = set(parts.modules)
    for module in parts.decoder.modules():
        if any(weight.dim() > 2 for weight in module.parameters(recurse=False)):
            stops.add(module)
    return {
        module
        for module in parts.decoder.modules()
        if "forward" in vars(module) or any(inner in stops for inner in module.modules())
    }


def _has_rows(value: Any, dim: int) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() > dim + 1
        and value.shape[0] == 1
        and value.shape[dim] == PROBE_ROWS
        and value.stride(-1) == 1
        and value.is_floating_point()
    )
