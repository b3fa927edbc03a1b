"""Where the result of a break lands.

The segments after a break read fixed addresses, so every replay's result is written back
into the memory that the first result was given. Tensors land in the graph's pool and are
held by address; fields that are no tensors are replaced in the object the caller got at
capture, where that object can change, and must stay equal where it cannot.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch

from breakgraph.graph.errors import LayoutChangedError

Writer = Callable[[Any], None]


class PoolMemory(Protocol):
    """The part of a graph's pool that landing needs."""

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fresh pool memory of ``tensor``'s layout, owned by the caller."""

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor at the same address that does not keep pool memory from reuse."""


class Landing:
    """The first result of a break, laid out for its segments (``value``), and ``write``.

    ``write`` lives as long as the graph and refers to neither ``value`` nor this object: what
    the captured code drops, the pool may give away.
    """

    def __init__(
        self, name: str, result: Any, arguments: Iterable[torch.Tensor], memory: PoolMemory
    ) -> None:
        self._fail = partial(_layout_changed, name)
        self._memory = memory
        self._arguments = {tensor.untyped_storage()._cdata for tensor in arguments}
        self._built: dict[int, tuple[Any, Writer]] = {}
        self.value: Any
        self.write: Writer
        self.value, self.write = self._build(result, "its result")
        self._built.clear()

    def _build(self, value: Any, where: str) -> tuple[Any, Writer]:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where)
        if id(value) in self._built:
            return self._built[id(value)]
        if isinstance(value, tuple):
            return self._tuple(value, where)
        if isinstance(value, list):
            keys: list[Any] = list(range(len(value)))
            return self._container(value, where, keys, "[{}]", list.__getitem__, list.__setitem__)
        if isinstance(value, dict):
            keys = list(value)
            return self._container(value, where, keys, "[{!r}]", _get_item, _set_item)
        if _has_fields(value):
            keys = _field_names(value)
            return self._container(value, where, keys, ".{}", getattr, object.__setattr__)
        return value, self._constant(value, where)

    def _tensor(self, first: torch.Tensor, where: str) -> tuple[torch.Tensor, Writer]:
        fail, layout = self._fail, (first.shape, first.dtype, first.device)
        described = f"a {_describe(first)}"
        if first.untyped_storage()._cdata in self._arguments:
            place = (first.data_ptr(), first.stride())

            def same_place(new: Any) -> None:
                if not isinstance(new, torch.Tensor) or (new.data_ptr(), new.stride()) != place:
                    raise fail(where, f"(a view of) an argument, {described}", _describe(new))
                if (new.shape, new.dtype, new.device) != layout:
                    raise fail(where, described, _describe(new))

            return first, same_place
        landed = self._memory.allocate_like(first)
        landed.copy_(first)
        target = self._memory.alias(landed)

        def copy_in(new: Any) -> None:
            same = isinstance(new, torch.Tensor) and (new.shape, new.dtype, new.device) == layout
            if not same:
                raise fail(where, described, _describe(new))
            target.copy_(new)

        return landed, copy_in

    def _tuple(self, first: tuple[Any, ...], where: str) -> tuple[Any, Writer]:
        parts = [self._build(item, f"{where}[{i}]") for i, item in enumerate(first)]
        values, writers = [part[0] for part in parts], [part[1] for part in parts]
        fail, kind, described = self._fail, type(first), _describe(first)

        def write(new: Any) -> None:
            if type(new) is not kind or len(new) != len(writers):
                raise fail(where, described, _describe(new))
            for writer, item in zip(writers, new, strict=True):
                writer(item)

        value = kind(*values) if hasattr(first, "_fields") else kind(values)
        return value, write

    def _container(
        self,
        first: Any,
        where: str,
        keys: list[Any],
        step: str,
        get: Callable[[Any, Any], Any],
        put: Callable[[Any, Any, Any], None],
    ) -> tuple[Any, Writer]:
        fail, kind, described = self._fail, type(first), _describe(first)
        value, writers = copy.copy(first), dict[Any, Writer]()
        refer = _reference(value)

        def replace(key: Any, place: str, was: str, new: Any) -> None:
            if isinstance(new, torch.Tensor):
                raise fail(place, was, _describe(new))
            holder = refer()
            if holder is not None:
                put(holder, key, new)

        def write(new: Any) -> None:
            if type(new) is not kind or _keys(new) != keys:
                raise fail(where, described, _describe(new))
            for key in keys:
                writers[key](get(new, key))

        self._built[id(first)] = value, write
        for key in keys:
            item, place = get(first, key), where + step.format(key)
            if isinstance(item, (torch.Tensor, tuple, list, dict)) or _has_fields(item):
                landed, writers[key] = self._build(item, place)
                put(value, key, landed)
            else:
                writers[key] = partial(replace, key, place, _describe(item))
        return value, write

    def _constant(self, first: Any, where: str) -> Writer:
        fail = self._fail

        def unchanged(new: Any) -> None:
            if new is not first and (type(new) is not type(first) or new != first):
                raise fail(where, repr(first), _describe(new))

        return unchanged


def _layout_changed(name: str, where: str, was: str, now: str) -> LayoutChangedError:
    return LayoutChangedError(
        f"break {name}: {where} was {was} at capture and is {now} at replay. The next segment "
        "reads the captured layout, so return the same structure, shapes and dtypes every time; "
        "what varies with the batch belongs in a tensor of fixed shape."
    )


def _reference(value: Any) -> Callable[[], Any]:
    """``value`` for as long as others hold it; for good if it cannot be referred to weakly."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _get_item(mapping: Any, key: Any) -> Any:
    return mapping[key]


def _set_item(mapping: Any, key: Any, value: Any) -> None:
    mapping[key] = value


def _has_fields(value: Any) -> bool:
    """A dataclass instance, or a plain object with a tensor somewhere among its attributes."""
    if isinstance(value, (type, torch.nn.Module)) or callable(value):
        return False
    if dataclasses.is_dataclass(value):
        return True
    attributes = getattr(value, "__dict__", {})
    return any(isinstance(item, torch.Tensor) for item in attributes.values())


def _field_names(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(vars(value))


def _keys(value: Any) -> list[Any]:
    if isinstance(value, list):
        return list(range(len(value)))
    return list(value) if isinstance(value, dict) else _field_names(value)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"{type(value).__name__} with keys {list(value)}"
    if _has_fields(value):
        return f"{type(value).__name__} with fields {_field_names(value)}"
    return repr(value)
