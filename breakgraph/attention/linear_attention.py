"""The seam of every recurrent mixer: Mamba2, gated delta rule, and what else keeps a state.

Projections, norms and gates are token-wise and captured; the convolution and the recurrence see
whole sequences, so they are one eager break, the same for every kind of mixer. Where the plan
lies in device memory of fixed size (a decode, or a prefill within the request slots that
``--linear-attention-capture`` set aside) there is no break and the same ops are captured.

The state of a running request lies in the slot of its row of the request table. A request with no
cached token starts from zeros, whatever its slot holds, and each forward leaves in the slot the
state after its last new token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import nn

from breakgraph.distributed import Shard
from breakgraph.forward import (
    DecodeInputs,
    ForwardBatch,
    HostStaging,
    LayerInputs,
    get_forward_context,
)
from breakgraph.graph import eager_on_graph
from breakgraph.kernels.causal_conv import causal_conv, causal_conv_step
from breakgraph.layers.linear import CheckpointSlot, row_slot, weight_parameter


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One new token a request.

    Attributes:
        slots: int64 ``[rows]``, the state slot of each row; padded rows have the reserved one.
    """

    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExtendPlan:
    """Packed sequences, cut into chunks that kernels work on side by side.

    A request past the batch has no tokens, and a chunk past the batch's chunks is of such a
    request: kernels leave both alone.

    Attributes:
        cu_seqlens: int32 ``[num_requests + 1]``, where each request's rows begin and end.
        initial_slots: int32 ``[num_requests]``, the slot to start from; -1 is zeros.
        final_slots: int32 ``[num_requests]``, the slot to leave the state in.
        chunk_offsets: int32 ``[num_requests + 1]``, the first chunk of each request.
        chunks: int32 ``[num_chunks, 2]``, a request, and which chunk of it.
    """

    cu_seqlens: torch.Tensor
    initial_slots: torch.Tensor
    final_slots: torch.Tensor
    chunk_offsets: torch.Tensor
    chunks: torch.Tensor


class LinearAttentionBackend(ABC):
    """Plans the recurrent mixers of a forward.

    Attributes:
        capturable: the plan lies at fixed addresses, so that the mixers may be captured.
        max_requests: the most requests of a forward; None for any number.
        plan: of the forward at hand, as its layers see it.
    """

    capturable: bool
    max_requests: int | None = None
    plan: ExtendPlan | StepPlan

    def tensors(self) -> list[torch.Tensor]:
        """What segments may read of the plan."""
        return []

    def init_forward_metadata(self, batch: ForwardBatch) -> None:  # noqa: B027
        """Plan ``batch`` from its host lengths, with no device-to-host sync."""

    def begin_layers(self, inputs: LayerInputs) -> None:  # noqa: B027
        """Run once before the first layer, captured with the layers."""


class LinearDecodeBackend(LinearAttentionBackend):
    """One step of each request; its row of the request table is its slot."""

    capturable = True
    plan: StepPlan

    def begin_layers(self, inputs: LayerInputs) -> None:
        if not isinstance(inputs, DecodeInputs):
            raise RuntimeError("a recurrent step needs the rows of the request table in its inputs")
        self.plan = StepPlan(inputs.request_rows)


class LinearPrefillBackend(LinearAttentionBackend):
    """Packed sequences of any lengths.

    Args:
        device: where the plan goes.
        max_requests: the most requests of a forward.
        max_tokens: the most rows of a forward.
        chunk_size: tokens of a chunk, as the mixers' kernels want them.
        reserved_slot: where the states of requests without a row are left, for nobody.
        static: keep the plan at fixed addresses and of the size that ``max_requests`` need,
            so that graphs can hold it.
    """

    plan: ExtendPlan
    max_requests: int

    def __init__(
        self,
        *,
        device: torch.device,
        max_requests: int,
        max_tokens: int,
        chunk_size: int,
        reserved_slot: int,
        static: bool = False,
    ) -> None:
        self.capturable, self.max_requests = static, max_requests
        self._chunk_size, self._reserved_slot = chunk_size, reserved_slot
        self._max_chunks = _most_chunks(max_tokens, max_requests, chunk_size)
        self._staging = HostStaging(_Layout(max_requests + 1, self._max_chunks).entries, device)

    def tensors(self) -> list[torch.Tensor]:
        return [self._staging.device_buffer]

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        size = batch.batch_size
        chunks = -(-batch.extend_lens.astype(np.int64) // self._chunk_size)
        used = int(chunks.sum())
        layout = _Layout(size, used)
        if self.capturable:
            if size > self.max_requests:
                raise ValueError(
                    f"{size} requests do not fit the {self.max_requests} slots of the graphs"
                )
            # One more request, which never has a token, for the chunks past the batch's.
            layout = _Layout(self.max_requests + 1, self._max_chunks)
        cu_seqlens, initial, final, offsets, pairs = layout.split(
            self._staging.host()[: layout.entries].view(np.int32)
        )
        cu_seqlens[0] = offsets[0] = 0
        np.cumsum(batch.extend_lens, out=cu_seqlens[1 : size + 1])
        cu_seqlens[size + 1 :] = batch.num_tokens
        np.cumsum(chunks, out=offsets[1 : size + 1])
        offsets[size + 1 :] = used
        rows = self._reserved_slot if batch.rows is None else batch.rows
        final[:size], final[size:] = rows, self._reserved_slot
        initial[:size], initial[size:] = np.where(batch.prefix_lens > 0, rows, -1), -1
        pairs[:used, 0] = np.repeat(np.arange(size), chunks)
        pairs[:used, 1] = np.arange(used) - np.repeat(offsets[:size], chunks)
        pairs[used:] = layout.requests - 1, 0
        sent = self._staging.send(layout.entries).view(torch.int32)
        self.plan = ExtendPlan(*layout.split(sent))

    def begin_layers(self, inputs: LayerInputs) -> None:
        if self.capturable:
            most = _most_chunks(len(inputs.positions), self.max_requests, self._chunk_size)
            self.plan = replace(self.plan, chunks=self.plan.chunks[:most])


Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the int32 arrays of a plan lie one after the other."""

    requests: int
    chunks: int

    @property
    def entries(self) -> int:
        """int64 entries, each of which holds two."""
        return -(-(4 * self.requests + 2 + 2 * self.chunks) // 2)

    def split(self, whole: Array) -> tuple[Array, Array, Array, Array, Array]:
        """The arrays of ``ExtendPlan``, in its order."""
        requests = self.requests
        ends = [requests + 1, 2 * requests + 1, 3 * requests + 1, 4 * requests + 2]
        return (
            whole[: ends[0]],
            whole[ends[0] : ends[1]],
            whole[ends[1] : ends[2]],
            whole[ends[2] : ends[3]],
            whole[ends[3] : ends[3] + 2 * self.chunks].reshape(-1, 2),
        )


def _most_chunks(rows: int, requests: int, chunk_size: int) -> int:
    """The most chunks that ``rows`` tokens of at most ``requests`` requests are cut into."""
    return min(rows, (rows + requests * (chunk_size - 1)) // chunk_size)


class RadixLinearAttention(nn.Module, ABC):
    """A causal convolution and a recurrence over packed sequences, as one break.

    ``conv_state`` (``[num_slots, kernel_size - 1, channels]``) and ``state``
    (``[num_slots, *state_shape]``, float32) are bound by the Mamba pool before the first forward.

    Args:
        channels: this rank's channels of the convolution, part by part.
        kernel_size: of the convolution.
        conv_bias: whether it has a bias.
        state_shape: of a request's recurrent state.
        out_features: of each token.

    Attributes:
        chunk_size: tokens of a chunk, as the kernels want them.
        conv_shape: ``(kernel_size - 1, channels)``, the inputs that the next token still needs.
    """

    chunk_size: ClassVar[int] = 64
    conv_state: torch.Tensor
    state: torch.Tensor

    def __init__(
        self,
        *,
        channels: tuple[Shard, ...],
        kernel_size: int,
        conv_bias: bool,
        state_shape: tuple[int, ...],
        out_features: int,
    ) -> None:
        super().__init__()
        self._channels, count = channels, sum(part.size for part in channels)
        self.conv_weight = weight_parameter(count, kernel_size)
        self.conv_bias = weight_parameter(count) if conv_bias else None
        self.conv_shape, self.state_shape = (kernel_size - 1, count), state_shape
        self.out_features = out_features

    def conv_slots(self) -> dict[str, CheckpointSlot]:
        """By checkpoint name; the weight has a dimension more there."""
        named = {"conv1d.weight": self.conv_weight.detach().unsqueeze(1)}
        if self.conv_bias is not None:
            named["conv1d.bias"] = self.conv_bias.detach()
        return {name: row_slot(tensor, *self._channels) for name, tensor in named.items()}

    def forward(self, *projected: torch.Tensor) -> torch.Tensor:
        """Mix the tokens of each request.

        Args:
            projected: ``[rows, ...]`` each, what the recurrence is made of.

        Returns:
            ``[rows, out_features]``; padded rows are zero, or of the reserved slot.
        """
        first, linear = projected[0], _linear_backend()
        out = first.new_zeros(len(first), self.out_features)
        tensors = self.lay_out(*projected, out)
        if linear.capturable:
            self.run(linear.plan, *tensors)
        else:
            self.mix(*tensors)
        return out

    @eager_on_graph(in_place=True)
    def mix(self, *tensors: torch.Tensor) -> None:
        """The break: the live batch's sequences."""
        if get_forward_context().batch.num_tokens:  # an idle rank has none, and no plan
            self.run(_linear_backend().plan, *tensors)

    def run(self, plan: ExtendPlan | StepPlan, *tensors: torch.Tensor) -> None:
        """Do what ``plan`` says with what ``lay_out`` gave."""
        if isinstance(plan, StepPlan):
            self.step(plan, *tensors)
        else:
            self.extend(plan, *tensors)

    def convolve(
        self, plan: ExtendPlan | StepPlan, channels: torch.Tensor, mixed: torch.Tensor
    ) -> None:
        """Write the convolution of ``channels: [rows, channels]``, activated, into ``mixed``."""
        common = (channels, self.conv_weight, self.conv_bias, self.conv_state)
        if isinstance(plan, StepPlan):
            causal_conv_step(*common, plan.slots, mixed)
        else:
            slots = (plan.initial_slots, plan.final_slots)
            causal_conv(*common, plan.cu_seqlens, *slots, plan.chunks, self.chunk_size, mixed)

    @abstractmethod
    def require_kernels(self) -> None:
        """Raise RuntimeError, saying what to install, if CUDA kernels cannot be made."""

    @abstractmethod
    def lay_out(self, *projected_and_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tensors of the break, views and scratch, so that it makes none itself."""

    @abstractmethod
    def extend(self, plan: ExtendPlan, *tensors: torch.Tensor) -> None:
        """Whole sequences: write the first ``cu_seqlens[-1]`` rows, and the final states."""

    @abstractmethod
    def step(self, plan: StepPlan, *tensors: torch.Tensor) -> None:
        """One token of each request: write every row, and the states in place."""


def _linear_backend() -> LinearAttentionBackend:
    linear = get_forward_context().attn_backend.linear
    if linear is None:
        raise RuntimeError(
            "the attention backend plans no recurrent mixers, and the model has some"
        )
    return linear
