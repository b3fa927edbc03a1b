"""One call's forwards, from planning to slots to the runner.

Rows and slots are taken here and nowhere else, and leaving the loop gives back every one,
whether by the end, an error in a forward or an error in the caller's own code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from breakgraph.engine.planning import Limits, Piece, Planner, Request
from breakgraph.engine.statistics import Statistics
from breakgraph.forward import ForwardBatch

if TYPE_CHECKING:
    from breakgraph.runner.model_runner import ForwardResult, ModelRunner

NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class Step:
    """A forward that ran: ``pieces`` are the requests of ``result``, in its order."""

    pieces: list[Piece]
    result: ForwardResult
    is_prefill: bool

    @property
    def completed(self) -> list[Request]:
        """The requests whose last known token was reached, so that their results count."""
        return [piece.request for piece in self.pieces if piece.completes]

    def prompt_logprobs(self) -> Iterator[tuple[Request, list[float]]]:
        """Per piece the log-probabilities of its tokens' successors within the prompt."""
        values, begin = _given(self.result.input_token_logprobs).tolist(), 0
        for piece in self.pieces:
            yield piece.request, values[begin : begin + piece.count - piece.completes]
            begin += piece.count

    def rows(self, output: torch.Tensor | None) -> torch.Tensor:
        """The rows of ``output``, ``[batch_size, size]``, that belong to ``completed``."""
        rows = [row for row, piece in enumerate(self.pieces) if piece.completes]
        return _given(output) if len(rows) == len(self.pieces) else _given(output)[rows]


class ForwardLoop:
    """Iterate the forwards that ``requests`` need, inside ``with``.

    After each step the caller appends a token to a completed request's ``ids``, or calls
    ``finish`` for it. Prefills may be replayed unless ``allow_graph`` is False; decodes are
    eager. ``logprobs`` asks for the log-probability of every prompt token but the first.
    """

    def __init__(
        self,
        runner: ModelRunner,
        requests: Sequence[Request],
        statistics: Statistics,
        *,
        allow_graph: bool = True,
        logprobs: bool = False,
    ) -> None:
        self._runner = runner
        self._requests = requests
        self._statistics = statistics
        self._allow_graph = allow_graph
        self._logprobs = logprobs
        self._planner = Planner(requests, limits(runner))

    def __enter__(self) -> ForwardLoop:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for request in self._requests:
            self._release(request)

    def __iter__(self) -> Iterator[Step]:
        clock = _Clock(self._runner.device)
        while True:
            pieces, is_prefill = self._planner.next_forward()
            if not pieces:
                return
            batch = self._batch(pieces)
            clock.start()
            result = self._runner.forward(batch, allow_graph=self._allow_graph and is_prefill)
            clock.stop()
            for piece in pieces:
                piece.request.computed += piece.count
            yield Step(pieces, result, is_prefill)
            if is_prefill:
                dispatch = result.dispatch
                self._statistics.record_prefill(
                    dispatch.bucket, dispatch.reason.value, batch.num_tokens, clock.ms()
                )
            else:
                self._statistics.decodes += 1

    def finish(self, request: Request) -> None:
        """Give back what the request holds; it takes part in no further forward."""
        self._planner.finish(request)
        self._release(request)
        self._statistics.prompts += 1

    def _release(self, request: Request) -> None:
        if request.row is not None:
            self._runner.requests.release(request.row)
            request.row = None

    def _batch(self, pieces: Sequence[Piece]) -> ForwardBatch:
        table = self._runner.requests
        new_ids, new_slots, prefixes, targets = [], [], [], []
        for piece in pieces:
            request, end = piece.request, piece.start + piece.count
            if request.row is None:
                request.row = table.acquire()
            prefixes.append(table.slots(request.row))
            new_slots.append(table.extend(request.row, piece.count))
            new_ids.append(request.ids[piece.start : end])
            if self._logprobs:
                targets += request.ids[piece.start + 1 : end + 1]
                targets += [NO_TARGET] * piece.completes
        return ForwardBatch.from_requests(
            new_ids,
            new_slots,
            prefixes,
            logprob_targets=np.asarray(targets, np.int64) if self._logprobs else None,
        )


def limits(runner: ModelRunner) -> Limits:
    """What the runner's forwards and pools hold."""
    return Limits(
        chunk_size=runner.chunk_size,
        max_running_requests=len(runner.requests.table),
        num_tokens=runner.slots.num_tokens,
        page_size=runner.slots.page_size,
    )


def dry_run(requests: Sequence[Request], limits: Limits) -> Iterator[ForwardBatch]:
    """The batches of the prefill of ``requests``, with slot 0 for every slot: shapes only."""
    planner = Planner(requests, limits)
    while pieces := planner.next_forward()[0]:
        yield ForwardBatch.from_requests(
            [p.request.ids[p.start : p.start + p.count] for p in pieces],
            [np.zeros(p.count, np.int64) for p in pieces],
            [np.zeros(p.start, np.int64) for p in pieces],
        )
        for piece in pieces:
            piece.request.computed += piece.count
            if piece.completes:
                planner.finish(piece.request)


def _given(output: torch.Tensor | None) -> torch.Tensor:
    if output is None:
        raise RuntimeError("the forward lacks an output it was asked for: a bug in the runner")
    return output


class _Clock:
    """Milliseconds of a forward: by CUDA events on a GPU, by the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if device.type == "cuda"
            else None
        )
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
            self._events[which].record()
