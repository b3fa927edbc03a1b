"""The recurrent states of running requests and of saved prefixes, at addresses that never change.

Captured segments and kernels read and write these buffers, so they are made once, before any
capture. The slot of a running request is its row of the request table; ``reserved_slot`` is
padding's and belongs to nobody. A slot's states of all layers lie side by side, so that a prefix
is saved or restored by two copies, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch


class RecurrentLayer(Protocol):
    """What the pool asks of a recurrent mixer."""

    conv_shape: tuple[int, int]
    state_shape: tuple[int, ...]
    conv_state: torch.Tensor
    state: torch.Tensor


class MambaPool:
    """States of the rows, of the reserved slot, and of ``num_snapshots`` prefixes behind it.

    Attributes:
        conv: ``[num_slots, elements of all conv_shape]`` in the model's dtype, zeros at first.
        state: float32 ``[num_slots, elements of all state_shape]``, zeros at first.
        num_slots: slots in all.
        reserved_slot: padding's, and of batches without rows.
        snapshots: the slots of saved prefixes.
        on_copy: told of each copy, from which slot to which; None tells nobody.
    """

    on_copy: Callable[[int, int], object] | None = None

    def __init__(
        self,
        layers: Sequence[RecurrentLayer],
        max_running_requests: int,
        num_snapshots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the buffers.

        Raises:
            RuntimeError: the device has not the memory.
        """
        self.reserved_slot = max_running_requests
        self.num_slots = max_running_requests + 1 + num_snapshots
        self.snapshots = range(max_running_requests + 1, self.num_slots)
        self._shapes = [(layer.conv_shape, layer.state_shape) for layer in layers]
        conv, state = _elements(layers)
        try:
            self.conv = torch.zeros(self.num_slots, conv, dtype=dtype, device=device)
            self.state = torch.zeros(self.num_slots, state, dtype=torch.float32, device=device)
        except torch.OutOfMemoryError as error:
            size = self.num_slots * self.bytes_per_slot(layers, dtype)
            raise RuntimeError(
                f"the recurrent states of {max_running_requests} running requests and "
                f"{num_snapshots} saved prefixes take {size / 2**30:.2f} GiB, which {device} does "
                "not have; lower --max-mamba-cache-size or --max-running-requests, or leave less "
                "to the KV cache by a lower --mem-fraction-static"
            ) from error

    @staticmethod
    def bytes_per_slot(layers: Sequence[RecurrentLayer], dtype: torch.dtype) -> int:
        """Bytes that the states of one request take over all ``layers``."""
        conv, state = _elements(layers)
        return conv * dtype.itemsize + state * torch.float32.itemsize

    def bind(self, layers: Sequence[RecurrentLayer]) -> None:
        """Give each layer its views, in order: ``[num_slots, *shape]``, a slot far from the next.

        Raises:
            ValueError: they are not the layers that the pool was made for.
        """
        if [(layer.conv_shape, layer.state_shape) for layer in layers] != self._shapes:
            raise ValueError(
                f"a pool of the states of {len(self._shapes)} recurrent layers cannot serve these "
                f"{len(layers)}: their number or shapes differ"
            )
        conv = self.conv.split([prod(shape) for shape, _ in self._shapes], dim=1)
        state = self.state.split([prod(shape) for _, shape in self._shapes], dim=1)
        for layer, of_conv, of_state in zip(layers, conv, state, strict=True):
            layer.conv_state = of_conv.unflatten(1, layer.conv_shape)
            layer.state = of_state.unflatten(1, layer.state_shape)

    def tensors(self) -> list[torch.Tensor]:
        """Every buffer: what a capture may read and write."""
        return [self.conv, self.state]

    def copy(self, from_slot: int, to_slot: int) -> None:
        """Copy a slot on the device, in stream order, with no sync."""
        if self.on_copy is not None:
            self.on_copy(from_slot, to_slot)
        self.conv[to_slot].copy_(self.conv[from_slot])
        self.state[to_slot].copy_(self.state[from_slot])


def _elements(layers: Sequence[RecurrentLayer]) -> tuple[int, int]:
    """Elements of a slot: of the convolutions, and of the recurrences."""
    return (
        sum(prod(layer.conv_shape) for layer in layers),
        sum(prod(layer.state_shape) for layer in layers),
    )
