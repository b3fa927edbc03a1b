"""What each mixer of a forward was given and gave, eagerly or in the breaks of a replay.

A break of a graph holds the function it calls, so nothing put in the function's place would see a
replay. But a break finds its backend, and a recurrent mixer its work, only when it runs: the
recorder stands in for these two, and both ways of running a batch pass it alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from breakgraph.attention import (
    Attention,
    AttentionBackend,
    ExtendPlan,
    RadixLinearAttention,
    StepPlan,
)
from breakgraph.forward import ForwardBatch, LayerInputs


@dataclass(frozen=True, slots=True)
class BreakCall:
    """One call of a mixer, on the host.

    Attributes:
        name: of the module.
        kind: what its break is called.
        inputs: ``[num_tokens, ...]`` each, before the call.
        output: ``[num_tokens, ...]``, after it.
    """

    name: str
    kind: str
    inputs: list[torch.Tensor]
    output: torch.Tensor


class BreakRecorder(AttentionBackend):
    """Does what ``inner`` does, and keeps copies of what passes; within ``recording`` alone.

    Args:
        inner: the backend of the forward.
        names: of the model's mixers.
        num_tokens: rows worth keeping; the others are padding.
        given: by recurrent mixer, which tensors of its work are inputs and not scratch. An eager
            pass finds out, a replay's must be given what that found.
    """

    def __init__(
        self,
        inner: AttentionBackend,
        names: Mapping[nn.Module, str],
        num_tokens: int,
        given: dict[nn.Module, tuple[int, ...]],
    ) -> None:
        self.inner, self.names, self.num_tokens, self.given = inner, names, num_tokens, given
        self.capturable, self.linear = inner.capturable, inner.linear
        self.equal_head_dims = inner.equal_head_dims
        self.calls: list[BreakCall] = []
        self.projected: tuple[torch.Tensor, ...] = ()

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        self.inner.init_forward_metadata(batch, rows)

    def begin_layers(self, inputs: LayerInputs) -> None:
        self.inner.begin_layers(inputs)

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        inputs = [self._copy(tensor) for tensor in (q, k, v)]
        self.inner.forward(layer, q, k, v, out)
        self._keep(layer, inputs, out)

    def note_projected(self, module: nn.Module, projected: tuple[torch.Tensor, ...]) -> None:
        """What an eager recurrent mixer is called with."""
        self.projected = projected

    def recurrence(
        self, module: RadixLinearAttention, plan: ExtendPlan | StepPlan, *tensors: torch.Tensor
    ) -> None:
        """In the place of ``module.run``; the output is the last tensor."""
        if self.projected:
            is_input = [any(one is tensor for one in self.projected) for tensor in tensors]
            self.given[module] = tuple(i for i, given in enumerate(is_input) if given)
        inputs = [self._copy(tensors[i]) for i in self.given[module]]
        type(module).run(module, plan, *tensors)
        self._keep(module, inputs, tensors[-1])

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self.num_tokens].to("cpu", copy=True)

    def _keep(self, module: nn.Module, inputs: list[torch.Tensor], out: torch.Tensor) -> None:
        name, kind = self.names[module], f"{type(module).__name__}.mix"
        self.calls.append(BreakCall(name, kind, inputs, self._copy(out)))


@contextmanager
def recording(recorder: BreakRecorder) -> Iterator[BreakRecorder]:
    """Let ``recorder`` see the recurrent mixers too."""
    recurrent = [module for module in recorder.names if isinstance(module, RadixLinearAttention)]
    hooks = [module.register_forward_pre_hook(recorder.note_projected) for module in recurrent]
    for module in recurrent:
        vars(module)["run"] = partial(recorder.recurrence, module)
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for module in recurrent:
            del vars(module)["run"]
