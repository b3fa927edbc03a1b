"""What a forward gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from breakgraph.graph import BreakableCUDAGraph
from breakgraph.runner.buckets import Dispatch

if TYPE_CHECKING:
    from breakgraph.runner.input_buffers import FilledBatch
    from breakgraph.runner.verification import Verification


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What a forward gives, on the device.

    Attributes:
        dispatch: bucket or None, and the reason.
        next_token_logits: float32 ``[batch_size, vocab_size]``, of generation models.
        input_token_logprobs: float32 ``[num_tokens]``, where the batch has targets.
        pooled: float32 ``[batch_size, hidden_size]`` or ``[batch_size, num_labels]``.
        graph: what was replayed; None of an eager forward.
        verification: the eager check that is due of a replayed prefill; call it before anything
            else runs, and after the reply is out.
    """

    dispatch: Dispatch
    next_token_logits: torch.Tensor | None = None
    input_token_logprobs: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    graph: BreakableCUDAGraph | None = None
    verification: Verification | None = None


@dataclass(frozen=True, slots=True)
class StackResult:
    """What the layer stack gives, before the eager tail.

    Attributes:
        hidden: ``[rows, hidden_size]``, real rows first.
        filled: the batch on the device.
        graph: as in ``ForwardResult``.
        verification: as in ``ForwardResult``.
    """

    hidden: torch.Tensor
    filled: FilledBatch
    graph: BreakableCUDAGraph | None = None
    verification: Verification | None = None
