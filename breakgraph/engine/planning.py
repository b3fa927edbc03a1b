"""Which tokens of which requests go into the next forward.

A request is admitted only when the pool can hold every token it may ever have, so a running
request never waits for a slot and nothing is ever preempted. Planning is arithmetic on lengths:
it touches no pool, no model and no device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a forward and the pool can hold.

    Attributes:
        chunk_size: the most tokens one forward takes.
        max_running_requests: requests that may hold slots at once.
        num_tokens: slots of the KV pool, a multiple of ``page_size``.
        page_size: slots of a page; a page serves one request.
    """

    chunk_size: int
    max_running_requests: int
    num_tokens: int
    page_size: int = 1


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way through the forwards.

    Attributes:
        index: the prompt's place in the call.
        ids: the prompt's tokens, and behind them the generated ones.
        prompt_len: tokens of the prompt.
        max_cached: the most tokens of it that will ever lie in the pool at once.
        computed: leading tokens of ``ids`` that lie in the pool already.
        row: its row in the request table; None while it holds none.
    """

    index: int
    ids: list[int]
    prompt_len: int
    max_cached: int
    computed: int = 0
    row: int | None = None

    @property
    def remaining(self) -> int:
        """Known tokens that no forward has taken yet."""
        return len(self.ids) - self.computed


@dataclass(frozen=True, slots=True)
class Piece:
    """``count`` tokens of a request, from its token ``start`` on.

    ``completes`` says that they reach its last known token, so that the logits are of use.
    """

    request: Request
    start: int
    count: int
    completes: bool


class Planner:
    """First come, first served; prompts go before decoding, so that decoding is in large batches.

    A prompt that fits into one forward is never cut. A longer one takes what the forward has
    left, and the next forwards begin with its rest.
    """

    def __init__(self, requests: Iterable[Request], limits: Limits) -> None:
        self._limits = limits
        self._waiting = deque(requests)
        self._running: dict[int, Request] = {}
        self._free_tokens = limits.num_tokens

    def next_forward(self) -> tuple[list[Piece], bool]:
        """The pieces of the next forward, and whether it is a prefill.

        A decode holds one token of each running request. Advance ``computed`` of every
        piece's request before asking again. No pieces: all requests are finished.
        """
        pieces = self._prefill()
        if pieces:
            return pieces, True
        decode = list(self._running.values())[: self._limits.chunk_size]
        return [_piece(request, 1) for request in decode], False

    def finish(self, request: Request) -> None:
        """Drop a running request: what it reserved is free for those that wait."""
        del self._running[request.index]
        self._free_tokens += self._reserve(request)

    def _prefill(self) -> list[Piece]:
        budget, pieces = self._limits.chunk_size, []
        for request in self._running.values():
            if request.computed < request.prompt_len:
                pieces.append(_piece(request, budget))
                budget -= pieces[-1].count
        while budget and self._waiting and self._fits(self._waiting[0], budget):
            request = self._waiting.popleft()
            self._running[request.index] = request
            self._free_tokens -= self._reserve(request)
            pieces.append(_piece(request, budget))
            budget -= pieces[-1].count
        return pieces

    def _fits(self, request: Request, budget: int) -> bool:
        return (
            (request.remaining <= budget or request.remaining > self._limits.chunk_size)
            and len(self._running) < self._limits.max_running_requests
            and self._reserve(request) <= self._free_tokens
        )

    def _reserve(self, request: Request) -> int:
        page = self._limits.page_size
        return -(-request.max_cached // page) * page


def _piece(request: Request, most: int) -> Piece:
    count = min(request.remaining, most)
    return Piece(request, request.computed, count, completes=count == request.remaining)
