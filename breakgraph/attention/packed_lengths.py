"""Where the sequences of a batch begin and end, at a fixed address and for a fixed number of them.

It is the whole plan of a captured attention over the new tokens alone: a replay finds the live
batch's lengths there. Slots past the batch are empty.
"""

from __future__ import annotations

import numpy as np
import torch

from breakgraph.forward import ForwardBatch, HostStaging


class PackedLengths:
    """``cu_seqlens``, int32 ``[max_requests + 1]`` on ``device``."""

    def __init__(self, max_requests: int, device: torch.device) -> None:
        self._slots = max_requests
        self._staging = HostStaging(max_requests + 1, device, torch.int32)
        self.cu_seqlens = self._staging.device_buffer

    def send(self, batch: ForwardBatch) -> None:
        """Plan ``batch``. Raises ValueError if it has more requests than there are slots."""
        size = batch.batch_size
        if size > self._slots:
            raise ValueError(f"{size} requests do not fit the {self._slots} slots of the graphs")
        host = self._staging.host()
        host[0] = 0
        np.cumsum(batch.extend_lens, out=host[1 : size + 1])
        host[size + 1 :] = batch.num_tokens
        self._staging.send(len(host))
