"""The way in: transformers' attention interface, ours for the length of one forward.

A class is changed by nothing but its configs' switches, which are put back after each forward, so
that the model computes for its owner what it did before. While they are ours, the class builds no
mask, its experts take a path without a host sync, and rotary frequencies stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from breakgraph.models.transformers_impl.attention import WrappedAttention

NAME = "breakgraph"
"""Our attention implementation: no mask function is registered under it, so none is called."""

SHAPES = "breakgraph_shapes"
"""The same, with a mask function that gives the mask's function in place of a mask."""

_LONG = "longrope"

AttentionCall = Callable[..., torch.Tensor]
"""Of module, query, key, value ``[1, heads, rows, dim]``, mask, scale and what else the class
gives; returns ``[1, rows, heads, dim]``."""


class _Local(threading.local):
    call: AttentionCall | None = None


_local = _Local()


def current_call() -> AttentionCall | None:
    """Where this thread's attention calls go; None outside of our forwards."""
    return _local.call


class DeferredMask:
    """What stands for a mask at load: how it would be made."""

    def __init__(self, function: Callable[..., Any], size: int | None) -> None:
        self.function, self.size = function, size


def register() -> None:
    """Make both names known to transformers. Doing it again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(SHAPES, _attention)
    AttentionMaskInterface.register(SHAPES, _deferred_mask)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    if _local.call is None:
        raise RuntimeError(
            f"the attention implementation {NAME!r} belongs to a wrapped model's forward; call "
            "the model through breakgraph.wrap, or choose another implementation for it"
        )
    return _local.call(module, query, key, value, attention_mask, scaling, more), None


def _deferred_mask(
    *, mask_function: Callable[..., Any], local_size: int | None = None, **more: Any
) -> DeferredMask:
    return DeferredMask(mask_function, local_size)


class Switches:
    """The attributes of a model that are ours during a forward.

    Attributes:
        experts: how the class's experts are computed; None where it has none.
        other_experts: other ways, should that one fail.
        forwards: what is called in the place of modules' own forwards; of modules whose forward
            is their class's.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedConfig

        configs = [getattr(module, "config", None) for module in model.modules()]
        found = [config for config in configs if isinstance(config, PreTrainedConfig)]
        self._configs = list({id(config): config for config in found}.values())
        self._ropes = [module for module in model.modules() if _changes_frequencies(module)]
        # Neither loops over experts in Python, where the class's own way may. The first costs what
        # the tokens cost; the second copies each token's experts' weights, but takes any dtype.
        self.experts: str | None = None
        self.other_experts: list[str] = []
        if any(_has_experts(module) for module in model.modules()):
            self.experts, self.other_experts = "grouped_mm", ["batched_mm"]
        self.forwards: dict[nn.Module, Callable[..., Any]] = {}

    def shortest_rope(self, length: int) -> int:
        """Tokens, of ``length``, up to which no rotary embedding would change."""
        configs = [getattr(rope, "config", None) for rope in self._ropes if rope.rope_type == _LONG]
        named = [getattr(config, "rope_parameters", None) or {} for config in configs]
        return min([length, *(p.get("original_max_position_embeddings", length) for p in named)])

    @contextmanager
    def ours(self, call: AttentionCall, implementation: str = NAME) -> Iterator[None]:
        """Send each attention call of this thread to ``call``."""
        saved: list[tuple[Any, str, Any]] = []

        def switch(owner: Any, name: str, value: Any) -> None:
            saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

        try:
            switch(_local, "call", call)
            for config in self._configs:
                switch(config, "_attn_implementation_internal", implementation)
                if self.experts is not None:
                    switch(config, "_experts_implementation_internal", self.experts)
            for rope in self._ropes:
                switch(rope, "rope_type", "default")
            for module, forward in self.forwards.items():
                vars(module)["forward"] = forward
            yield
        finally:
            for module in self.forwards:
                vars(module).pop("forward", None)
            for owner, name, value in reversed(saved):
                setattr(owner, name, value)


def _has_experts(module: nn.Module) -> bool:
    """Whether the module chooses among transformers' ways to compute experts."""
    can = getattr(type(module), "_can_set_experts_implementation", None)
    return can is not None and bool(can())


def _changes_frequencies(module: nn.Module) -> bool:
    """Whether the rotary embedding follows the longest position of a batch, which it would read
    back from the device, and which in a packed batch is that of another request."""
    kind = getattr(module, "rope_type", None)
    return isinstance(kind, str) and ("dynamic" in kind or kind == _LONG)


class LayerCalls:
    """The attention calls of a forward, sent to the layers recorded for them, in order.

    By order and not by module: a class may call one module several times, each with keys of its
    own.
    """

    def __init__(
        self, modules: Sequence[nn.Module], layers: Sequence[WrappedAttention], slots: torch.Tensor
    ) -> None:
        self._modules, self._layers, self._slots = modules, layers, slots
        self._next = 0
        self._angles: dict[tuple[int, bool], tuple[torch.Tensor, ...]] = {}

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None,
        more: dict[str, Any],
    ) -> torch.Tensor:
        layer = self._take(module)
        if attention_mask is not None:
            raise RuntimeError(
                f"{type(module).__name__} is given an attention mask that its class made itself; "
                "only masks made by transformers' mask functions can be told from data"
            )
        packed = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        return layer(*packed, self._slots).unsqueeze(0)

    def rotated(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any
    ) -> torch.Tensor:
        """The attention call of a module that has not rotated its heads, ``[rows, heads, dim]``.

        Takes and returns what ``WrappedAttention.rotate_and_attend`` does.
        """
        return self._take(module).rotate_and_attend(q, k, v, self._slots, **how)

    def angles(self, cos: torch.Tensor, sin: torch.Tensor, *, halved: bool) -> torch.Tensor:
        """``[rows, 2, rotated / 2]`` of a class's cosines and sines, made once for all layers.

        Args:
            cos: ``[1, rows, rotated]``, its halves alike, or half of that if ``halved``.
            sin: as ``cos``.
            halved: whether they are given once.
        """
        key = (id(cos), halved)
        if key not in self._angles:
            half = cos.shape[2] if halved else cos.shape[2] // 2
            both = torch.stack([cos[0, :, :half], sin[0, :, :half]], dim=1)
            self._angles[key] = (both, cos, sin)  # held, or others might get their ids
        return self._angles[key][0]

    def _take(self, module: nn.Module) -> WrappedAttention:
        """The layer whose turn it is. Raises RuntimeError where that is another module's."""
        index = self._next
        if index >= len(self._layers) or self._modules[index] is not module:
            raise RuntimeError(
                f"attention call {index} is of {type(module).__name__}, not the one seen when the "
                "model was loaded: its class chooses its layers anew in each forward"
            )
        self._next += 1
        return self._layers[index]

    def check_complete(self) -> None:
        """Raise RuntimeError where the class made fewer calls than when it was loaded."""
        if self._next != len(self._layers):
            raise RuntimeError(
                f"the class made {self._next} attention calls, not {len(self._layers)} as when the "
                "model was loaded"
            )
