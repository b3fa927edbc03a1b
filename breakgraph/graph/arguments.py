"""What a break may be given: tensors, whose address the capture fixes, and constants.

A list of lengths or a batch object would be frozen at its capture value, or worse, be the
caller's own object with the caller's later changes; both are refused.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import Any

import torch

from breakgraph.graph.callsite import call_site
from breakgraph.graph.errors import RefusedArgumentError

_CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    range,
    slice,
    type(...),
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.nn.Module,
    types.FunctionType,
    types.BuiltinFunctionType,
)

_CONTAINERS = (tuple, list, dict)


def freeze(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fix: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments a replay passes: ``fix`` of each tensor, constants as they are.

    Raises:
        RefusedArgumentError: for anything else, naming the argument.
    """
    done: dict[int, Any] = {}  # a mixer's result may land in its query

    def frozen(value: Any, key: int | str) -> Any:
        if id(value) not in done:
            done[id(value)] = _freeze(name, value, f"argument {key!r}", fix)
        return done[id(value)]

    positional = tuple([frozen(value, at) for at, value in enumerate(args)])
    return positional, {key: frozen(value, key) for key, value in kwargs.items()}


def _freeze(name: str, value: Any, where: str, fix: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_conj() or value.is_neg():
            raise RefusedArgumentError(
                f"break {name}: {where} is a lazily conjugated or negated view; pass "
                "tensor.resolve_conj().resolve_neg()"
            )
        return fix(value)
    if isinstance(value, _CONSTANTS):
        return value
    if isinstance(value, tuple):
        items = [_freeze(name, item, f"{where}[{i}]", fix) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    raise RefusedArgumentError(
        f"break {name}: {where} is a {type(value).__name__}, which a replay would see as it "
        f"was at capture ({call_site()}). A break takes tensors and constants (int, float, "
        "bool, str, dtype, tuples of them, modules); read what changes from request to "
        "request inside the break, for instance from get_forward_context().batch."
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of (nested) tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    if isinstance(value, _CONTAINERS):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, torch.Tensor):
                found.append(item)
            elif isinstance(item, _CONTAINERS):
                found += tensors_in(item)
    return found


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """``value`` with each tensor of its (nested) tuples, lists and dicts changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value
