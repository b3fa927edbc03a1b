"""The only static inputs of a forward, and the one method that fills them.

Capture fills them with a dummy batch, replay and eager forwards with the live one, through
the same code; a field that had a second path could differ between capture and replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from breakgraph.distributed import SINGLE, TensorParallelGroup
from breakgraph.forward import DecodeInputs, ForwardBatch, HostStaging, LayerInputs

Embed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ALIGNMENT = 16
"""Entries: columns begin at a multiple of 128 bytes, where loads of vectors are whole."""


@dataclass(frozen=True, slots=True)
class FilledBatch:
    """A batch on the device.

    Attributes:
        inputs: what the layer stack reads, padded to the rows asked for.
        extend_lens: int64 ``[batch_size]``, the rows of each request.
        last_rows: int64 ``[batch_size]``, the row of each request's last token.
        logprob_targets: int64 ``[num_tokens]``, or None when the batch has none.
    """

    inputs: LayerInputs
    extend_lens: torch.Tensor
    last_rows: torch.Tensor
    logprob_targets: torch.Tensor | None


def compute_local_num_token_non_padded(
    global_count: int, num_tokens_per_rank: int, rank: int, size: int
) -> int:
    """How many of the rows that ``rank`` has are real, where ``size`` ranks divide a batch.

    Rank 0 has the first ``num_tokens_per_rank`` rows, rank 1 the next, and ``global_count`` rows
    are real, the leading ones: so 0 to ``num_tokens_per_rank``.

    Raises:
        ValueError: there is no such rank, or the rows are fewer than the real ones.
    """
    if not 0 <= rank < size or not 0 <= global_count <= size * num_tokens_per_rank:
        raise ValueError(
            f"{global_count} real rows cannot be divided into {num_tokens_per_rank} for each of "
            f"{size} ranks, of which one is {rank}"
        )
    return min(max(global_count - rank * num_tokens_per_rank, 0), num_tokens_per_rank)


class PrefillInputBuffers:
    """The static inputs of a prefill, or of any batch that attends by the extend path.

    Static device memory for up to ``max_tokens`` rows, at the same addresses every time.

    Args:
        max_tokens: the most rows of a forward.
        max_requests: the most requests of a forward.
        hidden_size: width of the embedded tokens.
        dtype: their type.
        device: where the model is.
        embed: writes the embeddings of int64 ``[rows]`` ids into ``[rows, hidden_size]``.
        group: ranks that may divide rows, of which each then counts its own real ones.
    """

    columns = 3
    _padding: np.ndarray | int = 0

    def __init__(
        self,
        *,
        max_tokens: int,
        max_requests: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        embed: Embed,
        group: TensorParallelGroup = SINGLE,
    ) -> None:
        self.max_tokens, self.max_requests = max_tokens, max_requests
        # One copy a forward: the count of real rows, the lengths of requests, their last rows, then
        # columns of `rows` each and, at most as long, log-probability targets. So the place of what
        # is the requests' depends on their number alone, and views of it can be kept.
        self._last = 1 + max_requests
        self._head = -(-(self._last + max_requests) // ALIGNMENT) * ALIGNMENT
        self._staging = HostStaging(self._head + (self.columns + 1) * max_tokens, device)
        self._hidden = torch.zeros(max_tokens, hidden_size, dtype=dtype, device=device)
        self._embed, self._group = embed, group
        self._by_rows: dict[int, tuple[torch.Tensor, LayerInputs]] = {}
        self._by_requests: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensors(self) -> list[torch.Tensor]:
        """Every buffer, for the capture's audit."""
        return [self._staging.device_buffer, self._hidden]

    def fill(self, batch: ForwardBatch, rows: int) -> FilledBatch:
        """Write ``batch``, padded to ``rows`` rows; padding is token 0, position 0, slot 0.

        Raises:
            ValueError: the batch does not fit ``rows``, or the buffers.
        """
        tokens, requests = batch.num_tokens, batch.batch_size
        if not tokens <= rows <= self.max_tokens or requests > self.max_requests:
            raise ValueError(
                f"a batch of {tokens} tokens and {requests} requests does not fit {rows} of "
                f"{self.max_tokens} rows and {self.max_requests} requests; raise "
                "--chunked-prefill-size or --max-running-requests"
            )
        host, last = self._staging.host(), self._last
        host[0] = self._real_rows(tokens, rows)
        host[1 : 1 + requests] = batch.extend_lens
        host[last : last + requests] = batch.last_token_rows
        end = self._head
        for values in self._columns(batch):
            host[end : end + tokens] = values
            end += rows
        if tokens < rows:
            host[self._head : end].reshape(self.columns, rows)[:, tokens:] = self._padding
        if batch.logprob_targets is not None:
            host[end : end + tokens] = batch.logprob_targets
            end += tokens
        device = self._staging.send(end)
        ids, inputs = self._views(rows)
        if batch.input_embeds is None:
            self._embed(ids, inputs.hidden_states)
        else:
            inputs.hidden_states[:tokens].copy_(batch.input_embeds)
            inputs.hidden_states[tokens:].zero_()
        targets = None if batch.logprob_targets is None else device[-tokens:]
        return FilledBatch(inputs, *self._request_views(requests), targets)

    def _real_rows(self, tokens: int, rows: int) -> int:
        """``num_token_non_padded`` of this rank."""
        group = self._group
        if not group.scatters_rows:
            return compute_local_num_token_non_padded(tokens, rows, 0, 1)
        share = group.rows_of_rank(rows)
        return compute_local_num_token_non_padded(tokens, share, group.rank, group.size)

    def inputs(self, rows: int) -> LayerInputs:
        """The buffers as the layer stack sees them for ``rows`` rows."""
        return self._views(rows)[1]

    def _views(self, rows: int) -> tuple[torch.Tensor, LayerInputs]:
        """Token ids and the buffers of ``rows`` rows, made once."""
        found = self._by_rows.get(rows)
        if found is None:
            device = self._staging.device_buffer
            begin, size = self._head, self.columns * rows
            columns = device[begin : begin + size].view(self.columns, rows).unbind()
            common = (self._hidden[:rows], *columns[1:3], device[:1].view(torch.int32)[:1])
            found = columns[0], self._layer_inputs(common, columns[3:])
            self._by_rows[rows] = found
        return found

    def _request_views(self, requests: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and last rows of so many requests, made once."""
        found = self._by_requests.get(requests)
        if found is None:
            device, last = self._staging.device_buffer, self._last
            found = device[1 : 1 + requests], device[last : last + requests]
            self._by_requests[requests] = found
        return found

    def _columns(self, batch: ForwardBatch) -> list[np.ndarray | int]:
        """What each column holds for the tokens of ``batch``."""
        return [batch.input_ids, batch.positions, batch.out_cache_loc]

    def _layer_inputs(
        self, common: Sequence[torch.Tensor], more: Sequence[torch.Tensor]
    ) -> LayerInputs:
        return LayerInputs(*common)


class DecodeInputBuffers(PrefillInputBuffers):
    """The static inputs of a decode: its requests' rows and lengths too.

    Padding, and a batch without rows, take row ``max_requests`` of the slot mirror.
    """

    columns = 5

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self._padding = np.array([[0], [0], [0], [self.max_requests], [1]])

    def _columns(self, batch: ForwardBatch) -> list[np.ndarray | int]:
        rows = self.max_requests if batch.rows is None else batch.rows
        return [*super()._columns(batch), rows, batch.prefix_lens + 1]

    def _layer_inputs(
        self, common: Sequence[torch.Tensor], more: Sequence[torch.Tensor]
    ) -> LayerInputs:
        return DecodeInputs(*common, *more)
