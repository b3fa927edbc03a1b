"""Decode attention whose whole plan lies in device memory, so that a graph can hold it.

A captured launch reads slots from a mirror of the request table on the device. A row of the mirror
is uploaded when another request takes the row; from then on each step, captured too, appends the
slot of its own new token. So a decode in flight uploads nothing but its static inputs.
"""

from __future__ import annotations

import numpy as np
import torch

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.layer import Attention
from breakgraph.forward import DecodeInputs, ForwardBatch, HostStaging, LayerInputs
from breakgraph.kernels import decode_attention
from breakgraph.memory import RequestTable
from breakgraph.memory.slot_allocator import new_tokens


class SlotMirror:
    """A request table's slots on the device.

    Attributes:
        slots: int32 ``[max_running_requests + 1, width]``; the last row is padding's.
    """

    def __init__(self, requests: RequestTable, width: int, device: torch.device) -> None:
        """Mirror ``requests``, of whom none is longer than ``width``."""
        rows = len(requests.table)
        self.slots = torch.zeros(rows + 1, width, dtype=torch.int32, device=device)
        self._requests = requests
        self._uploaded = np.zeros(rows, np.int64)
        self._versions = np.full(rows, -1, np.int64)
        self._staging = HostStaging(width, device)

    def sync(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Bring the first ``lengths`` slots of ``rows`` up to date; one more will be appended.

        Raises:
            ValueError: a row or its length lies outside, which on a GPU would end the process.
        """
        held, width = self._requests.table.shape[0], self.slots.shape[1]
        if rows.min() < 0 or rows.max() >= held or lengths.max() >= width:
            raise ValueError(
                f"a decode of rows {rows.tolist()} with {lengths.tolist()} cached tokens does not "
                f"fit the request table of {held} rows of {width} tokens"
            )
        versions = self._requests.versions[rows]
        known = np.where(self._versions[rows] == versions, self._uploaded[rows], 0)
        stale = np.flatnonzero(known < lengths)
        if len(stale):
            self._upload(rows[stale], known[stale], lengths[stale])
        self._versions[rows], self._uploaded[rows] = versions, lengths + 1

    def _upload(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """Copy parts of rows, all by one operation, however many rows there are."""
        nth, token = new_tokens(begins, ends)
        row, count = rows[nth], len(token)
        if 2 * count > self._staging.capacity:
            self._staging = HostStaging(4 * count, self.slots.device)
        host = self._staging.host()
        host[:count] = row * self.slots.shape[1] + token
        host[count : 2 * count] = self._requests.table[row, token]
        places, slots = self._staging.send(2 * count).split(count)
        self.slots.view(-1).index_copy_(0, places, slots.to(torch.int32))


class PagedDecodeBackend(AttentionBackend):
    """One new token a request, attending through the mirror."""

    capturable = True

    def __init__(self, mirror: SlotMirror) -> None:
        self.mirror = mirror
        self._inputs: DecodeInputs | None = None

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        if batch.rows is not None:
            self.mirror.sync(batch.rows, batch.prefix_lens)

    def begin_layers(self, inputs: LayerInputs) -> None:
        if not isinstance(inputs, DecodeInputs):
            raise RuntimeError("decode attention needs the rows of the request table in its inputs")
        self._inputs = inputs
        new_slots = inputs.out_cache_loc.to(torch.int32)
        self.mirror.slots.index_put_((inputs.request_rows, inputs.positions), new_slots)

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        inputs = self._inputs
        if inputs is None:
            raise RuntimeError("attention was called before begin_layers gave it the inputs")
        decode_attention(
            q,
            layer.k_cache,
            layer.v_cache,
            self.mirror.slots,
            inputs.request_rows,
            inputs.seq_lens,
            layer.scale,
            out,
        )
