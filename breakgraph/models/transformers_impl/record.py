"""What a class's attention calls look like, seen in one forward over a short sequence at load.

Nothing of a class is guessed from its name or its attributes: heads, widths, scale, soft cap and
sinks are those of the calls it makes, and the keys a query sees those of the mask it asks for.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from breakgraph.models.checkpoint import ModelLoadError
from breakgraph.models.transformers_impl.attention import WrappedAttention
from breakgraph.models.transformers_impl.interface import SHAPES, DeferredMask, Switches
from breakgraph.models.transformers_impl.plan import PlanCache
from breakgraph.models.transformers_impl.reach import MaskShapeError, Reach, reach_of

_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One attention call.

    Attributes:
        module: that made it.
        num_heads, num_kv_heads, key_dim, value_dim: of its queries, keys and values.
        scale: of the scores.
        reach: which keys a query sees.
        soft_cap, sinks: as for ``WrappedAttention``.
    """

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    reach: Reach
    soft_cap: float | None
    sinks: torch.Tensor | None


class Recorder:
    """Takes the attention calls of one forward; each gives zeros."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []

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
        (batch, heads, rows, width), value_dim = query.shape, value.shape[-1]
        if batch != 1 or key.shape[2] != rows or value.shape[2] != rows:
            raise ModelLoadError(
                f"{line_of(module)} attends from {rows} tokens to {key.shape[2]}; only "
                "self-attention over the tokens of a sequence can be run from the KV cache"
            )
        call = RecordedCall(
            module=module,
            num_heads=heads,
            num_kv_heads=key.shape[1],
            key_dim=width,
            value_dim=value_dim,
            scale=width**-0.5 if scaling is None else float(scaling),
            reach=_reach(module, attention_mask, more, query.device),
            soft_cap=more.get("softcap"),
            sinks=more.get("s_aux"),
        )
        self.calls.append(call)
        return query.new_zeros(1, rows, heads, value_dim)


def _reach(module: nn.Module, mask: Any, more: dict[str, Any], device: torch.device) -> Reach:
    if isinstance(mask, DeferredMask):
        size = mask.size if mask.size is not None else more.get("sliding_window")
        try:
            return reach_of(mask.function, size, device)
        except MaskShapeError as error:
            raise ModelLoadError(f"{line_of(module)} cannot be wrapped: {error}") from error
    if mask is not None:
        raise ModelLoadError(
            f"{line_of(module)} is given an attention mask that its class built itself; only masks "
            "of transformers' mask functions can be done without"
        )
    causal = more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = more.get("sliding_window")
    if not causal:
        return Reach(right=None)
    return Reach() if window is None else Reach(left=window - 1)


def line_of(thing: Any) -> str:
    """``Class (file:line)`` of an object's class."""
    kind = thing if isinstance(thing, type) else type(thing)
    try:
        file, line = inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1]
    except (OSError, TypeError):
        return kind.__name__
    return f"{kind.__name__} ({file}:{line})"


def _last_line(error: BaseException) -> str:
    """``file:line`` of where ``error`` was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"


def _place(frame: FrameType | None) -> str:
    """``file:line`` of the innermost frame outside torch."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return "unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _Watch(TorchDispatchMode):
    """Notes what short sequences do not show by their results.

    Attributes:
        mixes: where a softmax or an attention op runs that is not ours.
        counts: where rows are counted, in place of the positions given: in a packed batch that is
            the position in another request, which a scale of long contexts alone may read.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self.mixes = self.counts = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        mixes = "attention" in name or (name == "aten::_softmax" and args[0].dim() == 4)
        if mixes and not self.mixes:
            self.mixes = _place(sys._getframe(1))
        result = func(*args, **(kwargs or {}))
        if name.startswith("aten::arange") and result.numel() == self._tokens and not self.counts:
            place = _place(sys._getframe(1))
            self.counts = "" if f"{os.sep}integrations{os.sep}" in place else place
        return result


@torch.no_grad()
def record_calls(
    decoder: nn.Module, switches: Switches, embeds: torch.Tensor, arguments: dict[str, Any]
) -> tuple[list[RecordedCall], Any]:
    """Run ``decoder`` over one sequence.

    Args:
        decoder: the layer stack.
        switches: of the whole model.
        embeds: ``[1, tokens, hidden_size]``.
        arguments: what else it is called with.

    Returns:
        Its attention calls, and what it gave.

    Raises:
        ModelLoadError: it cannot be run from packed embeddings, or its attention does not go
            through the interface; names the line.
    """
    recorder, watch = Recorder(), _Watch(embeds.shape[1])
    try:
        with switches.ours(recorder, SHAPES), watch:
            output = decoder(inputs_embeds=embeds, **arguments)
    except ModelLoadError:
        raise
    except Exception as error:  # whatever a class raises that wants other inputs
        if DeferredMask.__name__ in str(error):
            raise ModelLoadError(
                f"{line_of(decoder)} computes with its attention mask ({_last_line(error)}), which "
                "is not made here"
            ) from error
        raise ModelLoadError(
            f"{line_of(decoder)} does not run from embeddings and positions alone "
            f"({_last_line(error)}: {type(error).__name__}: {error})"
        ) from error
    if watch.counts:
        raise ModelLoadError(
            f"{line_of(decoder)} counts the rows of its input ({watch.counts}) where positions are "
            "given to it; in a packed batch that is another request's position"
        )
    if watch.mixes:
        raise ModelLoadError(
            f"{line_of(decoder)} attends outside transformers' attention interface "
            f"({watch.mixes}), so its keys and values cannot be kept in the KV cache"
        )
    if not recorder.calls:
        raise ModelLoadError(
            f"{line_of(decoder)} makes no call to transformers' attention interface, so nothing of "
            "it can be run from the KV cache"
        )
    return recorder.calls, output


def make_layers(calls: list[RecordedCall], context_length: int) -> list[WrappedAttention]:
    """A layer for each call. Raises ModelLoadError where one KV pool cannot serve them all."""
    kv_heads = sorted({call.num_kv_heads for call in calls})
    if len(kv_heads) > 1:
        raise ModelLoadError(
            f"{line_of(calls[0].module)} has layers of {' and '.join(map(str, kv_heads))} KV "
            "heads; the KV cache wants as many in each layer"
        )
    plans = PlanCache()
    head_dim = max(max(call.key_dim, call.value_dim) for call in calls)
    return [
        WrappedAttention(
            num_heads=call.num_heads,
            num_kv_heads=call.num_kv_heads,
            head_dim=head_dim,
            value_dim=call.value_dim,
            scale=call.scale,
            reach=call.reach.within(context_length),
            soft_cap=call.soft_cap,
            sinks=call.sinks,
            plans=plans,
        )
        for call in calls
    ]
