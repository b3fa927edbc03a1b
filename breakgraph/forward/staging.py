"""Pinned host memory that a forward's integers pass through on their way to the device.

A slot of the ring is written again only after the copy that last read it has finished, so
a forward may be queued while the one before it still runs.
"""

from __future__ import annotations

import numpy as np
import torch

RING = 4


class HostStaging:
    """A device buffer of int64 and the host ring that fills it, one copy a fill."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.device_buffer = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._cuda = device.type == "cuda"
        ring = RING if self._cuda else 1
        self._host = [
            torch.zeros(capacity, dtype=torch.int64, pin_memory=self._cuda) for _ in range(ring)
        ]
        self._views: list[np.ndarray] = [host.numpy() for host in self._host]
        self._copied = [torch.cuda.Event() for _ in range(ring)] if self._cuda else []
        self._next = 0

    @property
    def capacity(self) -> int:
        return self.device_buffer.numel()

    def host(self) -> np.ndarray:
        """The host array, int64 ``[capacity]``, to write before the next ``send``."""
        if self._cuda:
            self._copied[self._next].synchronize()
        return self._views[self._next]

    def send(self, count: int) -> torch.Tensor:
        """Copy the first ``count`` entries to the device; returns them there."""
        device = self.device_buffer[:count]
        device.copy_(self._host[self._next][:count], non_blocking=True)
        if self._cuda:
            self._copied[self._next].record()
            self._next = (self._next + 1) % len(self._host)
        return device
