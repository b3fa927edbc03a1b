"""From planned pieces to a batch, and from a forward's rows back to their requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from breakgraph.engine.request import Request, TokenLogprob, Want
from breakgraph.engine.sampling import sample
from breakgraph.forward import ForwardBatch, ForwardMode, current_stream, pack
from breakgraph.memory import MambaPool, RankMemory, RequestTable

if TYPE_CHECKING:
    from breakgraph.runner.forward_result import ForwardResult

NO_TARGET = -1


class RankedRunner(Protocol):
    """What a scheduler of several ranks asks of ``RankedForward``."""

    def run(self, batches: Sequence[ForwardBatch], *, allow_graph: bool) -> list[ForwardResult]: ...


class Runner(Protocol):
    """What a scheduler asks of ``ModelRunner``."""

    chunk_size: int
    device: torch.device
    requests: RequestTable
    mamba_pool: MambaPool | None

    @property
    def rank_memory(self) -> Sequence[RankMemory]: ...

    @property
    def ranked(self) -> RankedRunner | None: ...

    def forward(self, batch: ForwardBatch, *, allow_graph: bool = True) -> ForwardResult: ...


@dataclass(slots=True)
class Piece:
    """``count`` tokens of a request, from its token ``start`` on; its row has slots for them."""

    request: Request
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def completes(self) -> bool:
        """Whether it reaches the last known token, so that its logits are of use."""
        return self.end == len(self.request.ids)


@dataclass(frozen=True, slots=True)
class Work:
    """A forward that is to run: what it takes, and its batch.

    Attributes:
        pieces: what it takes.
        mode: what it is for.
        batch: the same for a runner.
    """

    pieces: Sequence[Piece]
    mode: ForwardMode
    batch: ForwardBatch

    @property
    def allow_graph(self) -> bool:
        """Whether no request asked for an eager forward."""
        return all(piece.request.allow_graph for piece in self.pieces)


def take_result(
    pieces: Sequence[Piece], result: ForwardResult
) -> list[tuple[Request, int, TokenLogprob | None]]:
    """Keep in the requests of ``pieces`` what is not a token, and choose the tokens.

    Returns:
        Each request that has a token generated, with it. All others whose last known token the
        forward reached have their results in them.
    """
    _keep_prompt_logprobs(pieces, result.input_token_logprobs)
    done = [(row, piece.request) for row, piece in enumerate(pieces) if piece.completes]
    chosen: list[tuple[Request, int, TokenLogprob | None]] = []
    for want in {request.want for _, request in done} - {Want.NOTHING}:
        rows = [row for row, request in done if request.want is want]
        requests = [request for _, request in done if request.want is want]
        values = result.pooled if want is Want.POOLED else result.next_token_logits
        if values is None:
            raise RuntimeError("the forward lacks an output it was asked for: a bug in the runner")
        if len(rows) < len(pieces):
            values = values[rows]
        if want is Want.TOKENS:
            tokens = zip(requests, sample(values, requests), strict=True)
            chosen += [(request, *token) for request, token in tokens]
        else:
            _keep_vectors(requests, values)
    return chosen


def make_batch(pieces: Sequence[Piece], table: RequestTable, mode: ForwardMode) -> ForwardBatch:
    """The forward of ``pieces``."""
    rows = np.array([held(piece.request) for piece in pieces], np.int64)
    begins = np.array([piece.start for piece in pieces], np.int32)
    counts = np.array([piece.count for piece in pieces], np.int32)
    ids = [piece.request.ids[piece.start : piece.start + piece.count] for piece in pieces]
    return ForwardBatch(
        input_ids=pack(ids),
        out_cache_loc=table.slots_of(rows, begins, begins + counts).astype(np.int64),
        extend_lens=counts,
        prefix_lens=begins,
        prefix_slots=pack(
            [table.table[held(piece.request), : piece.start] for piece in pieces if piece.start]
        ),
        logprob_targets=_targets(pieces),
        mode=mode,
        rows=rows,
    )


def _targets(pieces: Sequence[Piece]) -> np.ndarray | None:
    """Per row the prompt's next token, where a request wants its log-probability."""
    if not any(piece.request.wants_prompt_logprobs for piece in pieces):
        return None
    targets: list[int] = []
    for piece in pieces:
        request = piece.request
        known = []
        if request.wants_prompt_logprobs:
            known = request.ids[piece.start + 1 : min(piece.end + 1, request.prompt_len)]
        targets += known + [NO_TARGET] * (piece.count - len(known))
    return np.array(targets, np.int64)


def _keep_prompt_logprobs(pieces: Sequence[Piece], values: torch.Tensor | None) -> None:
    """Give each request that wants them its prompt's log-probabilities, ``[num_tokens]``."""
    if values is None:
        return
    packed, begin = values.tolist(), 0
    for piece in pieces:
        request = piece.request
        if request.wants_prompt_logprobs:
            count = min(piece.count, request.prompt_len - 1 - piece.start)
            request.prompt_logprobs += packed[begin : begin + count]
        begin += piece.count


def _keep_vectors(requests: Sequence[Request], values: torch.Tensor) -> None:
    """Give each request its row of ``values``, or its labels' log-probabilities by that row."""
    labelled = [(row, request) for row, request in enumerate(requests) if request.labels]
    if len(labelled) < len(requests):
        for request, vector in zip(requests, values.float().cpu().unbind(), strict=True):
            request.vector = vector
    if labelled:
        places = [(row, label) for row, request in labelled for label in request.labels]
        rows, labels = torch.tensor(places).to(values.device, non_blocking=True).unbind(1)
        logprobs = values.log_softmax(-1)[rows, labels].cpu()
        parts = logprobs.split([len(request.labels) for _, request in labelled])
        for (_, request), vector in zip(labelled, parts, strict=True):
            request.vector = vector


def held(request: Request) -> int:
    """The request's row. Raises RuntimeError where it has none: a bug in the scheduler."""
    if request.row is None:
        raise RuntimeError(f"request {request.number} is in a forward and holds no row: a bug")
    return request.row


class Clock:
    """Milliseconds of a forward: by CUDA events on a GPU, by the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if device.type == "cuda"
            else None
        )
        self._index = device.index or 0
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def ms(self) -> float:
        """The time between start and stop; waits for the GPU to have come that far."""
        if self._events is None:
            return 1e3 * (self._times[1] - self._times[0])
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1])

    def _mark(self, which: int) -> None:
        if self._events is None:
            self._times[which] = time.perf_counter()
        else:
            self._events[which].record(current_stream(self._index))
