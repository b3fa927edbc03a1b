"""Pinned host memory that a forward's integers pass through on their way to the device.

A slot of the ring is written again only after the copy that last read it has finished, so
a forward may be queued while the one before it still runs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

RING = 4
KEPT = 128
"""Counts whose tensors a ring remembers: to slice two takes longer than to ask for the copy."""


class HostStaging:
    """A device buffer of integers and the host ring that fills it, one copy a fill."""

    def __init__(
        self, capacity: int, device: torch.device, dtype: torch.dtype = torch.int64
    ) -> None:
        self.device_buffer = torch.zeros(capacity, dtype=dtype, device=device)
        self._cuda = device.type == "cuda"
        ring = RING if self._cuda else 1
        self._host = [
            torch.zeros(capacity, dtype=dtype, pin_memory=self._cuda) for _ in range(ring)
        ]
        self._views: list[np.ndarray] = [host.numpy() for host in self._host]
        self._copied = [torch.cuda.Event() for _ in range(ring)] if self._cuda else []
        self._index = self.device_buffer.get_device()
        self._parts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._next = 0

    @property
    def capacity(self) -> int:
        return self.device_buffer.numel()

    def host(self) -> np.ndarray:
        """The host array ``[capacity]``, to write before the next ``send``."""
        if self._cuda:
            self._copied[self._next].synchronize()
        return self._views[self._next]

    def send(self, count: int) -> torch.Tensor:
        """Copy the first ``count`` entries to the device; returns them there."""
        found = self._parts.get((self._next, count))
        device, host = found or self._cut(count)
        device.copy_(host, non_blocking=True)
        if self._cuda:
            self._copied[self._next].record(current_stream(self._index))
            self._next = (self._next + 1) % len(self._host)
        return device

    def _cut(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``count`` entries of the device buffer and of the ring's slot."""
        if len(self._parts) >= KEPT * len(self._host):
            self._parts.clear()
        parts = self.device_buffer[:count], self._host[self._next][:count]
        self._parts[self._next, count] = parts
        return parts


def current_stream(index: int) -> torch.cuda.Stream:
    """The current stream of GPU ``index``, as torch gives it but made once.

    ``torch.cuda.current_stream`` reads environment variables too: it was 25 of the 47 µs that a
    ``send`` took under a profiler on an H200.
    """
    return _kept_stream(index, torch._C._cuda_getCurrentRawStream(index))


@cache
def _kept_stream(index: int, handle: int) -> torch.cuda.Stream:
    """That of ``handle``, which is current."""
    return torch.cuda.current_stream(index)
