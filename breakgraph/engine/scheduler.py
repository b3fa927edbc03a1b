"""Which tokens of which requests go into the next forward, and what becomes of its rows.

The oldest request always gets on: it is admitted first and retracted last, and alone it fits the
pool. So every request ends, and a retracted one goes on where it stood. Prompts go before decoding,
so that decoding is in large batches, but neither waits for the other longer than
``MAX_PREFILLS`` forwards; and a prompt in chunks shares each forward with the short ones.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from breakgraph.engine.batching import (
    Clock,
    Piece,
    Runner,
    Work,
    held,
    make_batch,
    take_result,
)
from breakgraph.engine.request import FinishReason, Request, TokenLogprob, Want
from breakgraph.engine.statistics import LastPrefill, Statistics
from breakgraph.forward import ForwardMode
from breakgraph.memory import KVSpace, RankMemory

if TYPE_CHECKING:
    from breakgraph.runner.forward_result import ForwardResult
    from breakgraph.runner.verification import Verification

MAX_PREFILLS = 4
"""Prefill forwards, of a full one's tokens at most together, before the running decode again."""

HEADROOM = 64
"""New tokens a running request is trusted with when another is admitted, in place of all it may
ever have: few requests use all that they may, and one that does retracts another."""

WORTH_WAITING = 32
"""Tokens that two prompts have in common for one to wait a forward for the other's."""

WORTH_CUTTING = 64
"""Tokens that the next prompt with the same beginning must save for a prompt to be cut where its
own ways part, so that the state there is kept. The cut costs a forward, which with so few tokens
takes as long as with one: it reads the same weights."""


class Update(NamedTuple):
    """News of a request: a generated token, its end, or both. The request tells the rest."""

    request: Request
    token: int | None = None
    logprob: TokenLogprob | None = None


class CacheUse(NamedTuple):
    """Tokens of a KV cache.

    Attributes:
        free: that a new request could have, cached ones nobody uses with them.
        used: that running requests hold.
        cached: in the prefix cache, in use or not.
    """

    free: int
    used: int
    cached: int


class Scheduler:
    """A step loop over a runner: ``add`` requests, ``step`` while there is work; no threads.

    A step is ``begin``, the forward and ``end``, or ``fail``: ranks that run one forward together
    take these apart.

    Attributes:
        kv: rows, slots and cached prefixes.
        waiting: requests that hold nothing, the oldest first.
        running: requests that hold a row, by number.
        statistics: what has been done.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        cache_prefixes: bool = True,
        random_seed: int = 0,
        headroom: int = HEADROOM,
        statistics: Statistics | None = None,
        memory: RankMemory | None = None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """``memory`` is that of the runner's rank; ``numbers`` are shared with other schedulers."""
        memory = memory or RankMemory(runner.requests, runner.mamba_pool)
        self.kv = KVSpace(memory.table, cache_prefixes, memory.states)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.statistics = Statistics() if statistics is None else statistics
        self._runner = runner
        self._chunk = runner.chunk_size
        self._random_seed = random_seed
        self._headroom = headroom
        self._numbers = itertools.count() if numbers is None else numbers
        self._deadlines: list[tuple[float, int, Request]] = []
        self._clock = Clock(runner.device)
        self._prefills = self._prefill_tokens = 0  # since the last decode
        self._long_first = False
        self._verification: Verification | None = None  # due, of the last forward

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def idle_and_empty(self) -> bool:
        """True when no request is left and none has left a slot behind but in the cache."""
        return not self.has_work and self.kv.is_empty

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def cache_use(self) -> CacheUse:
        """How full the KV cache is."""
        kv = self.kv
        free, total = kv.available_pages * kv.page_size, kv.table.allocator.num_tokens
        return CacheUse(free, total - free, 0 if kv.cache is None else kv.cache.cached_tokens)

    def forget(self) -> None:
        """Let go of all cached prefixes that nobody uses."""
        self.kv.flush()

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.number = next(self._numbers)
        seed = request.params.seed
        request.seed = (self._random_seed << 32) + request.number if seed is None else seed
        self.waiting.append(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.number, request))
            if len(self._deadlines) > 2 * (len(self.waiting) + len(self.running)) + 64:
                self._deadlines = [e for e in self._deadlines if e[2].finish_reason is None]
                heapq.heapify(self._deadlines)

    def abort(self, request: Request, reason: FinishReason = "abort") -> list[Update]:
        """End a request as it is, with all that it holds given back; nothing if it has ended."""
        if request.finish_reason is not None:
            return []
        self._finish([(request, reason)])
        return [Update(request)]

    def abort_all(self) -> list[Update]:
        """End every request."""
        requests = [*self.waiting, *self.running.values()]
        return [update for request in requests for update in self.abort(request)]

    def step(self) -> list[Update]:
        """Run one forward, if there is work; returns the news, in no certain order.

        A forward that raises ends its requests with "error", the exception in ``error``; the
        others go on.
        """
        updates, work = self.begin()
        if work is None:
            return updates
        try:
            self._clock.start()
            result = self._runner.forward(work.batch, allow_graph=work.allow_graph)
            self._clock.stop()
        except Exception as error:
            return updates + self.fail(work.pieces, error)
        return updates + self.end(work, result, self._clock.ms)

    def begin(self) -> tuple[list[Update], Work | None]:
        """What has ended by now, and the forward to run next, if there is work."""
        self.verify()
        updates: list[Update] = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            updates += self.abort(heapq.heappop(self._deadlines)[2], "deadline")
        pieces, mode = self._plan()
        if not pieces:
            return updates, None
        try:
            return updates, Work(pieces, mode, make_batch(pieces, self.kv.table, mode))
        except Exception as error:
            return updates + self.fail(pieces, error), None

    def end(self, work: Work, result: ForwardResult, ms: Callable[[], float]) -> list[Update]:
        """What ``work`` has come to, with what its forward gave in ``ms()`` milliseconds."""
        try:
            return self._take_result(work, result, ms)
        except Exception as error:
            return self.fail(work.pieces, error)

    def fail(self, pieces: Sequence[Piece], error: Exception) -> list[Update]:
        """End the requests of a forward that raised."""
        requests = [piece.request for piece in pieces]
        failed = [request for request in requests if request.finish_reason is None]
        for request in failed:
            request.error = error
        self._finish([(request, "error") for request in failed])
        return [Update(request) for request in requests]

    def verify(self) -> None:
        """Run the last forward's eager check, if it is due: call it when its news are delivered.

        The next step would do so first of all: planning it may put other states in the rows that
        the check looks at.
        """
        check, self._verification = self._verification, None
        if check is not None:
            check()

    # Planning.

    def _plan(self) -> tuple[list[Piece], ForwardMode]:
        prefilled = self._prefills >= MAX_PREFILLS or self._prefill_tokens >= self._chunk
        decode = self._plan_decode() if prefilled else []
        if not decode:
            prefill = self._plan_prefill()
            if prefill:
                self._prefills += 1
                self._prefill_tokens += sum(piece.count for piece in prefill)
                return prefill, ForwardMode.PREFILL
            decode = self._plan_decode()
        self._prefills = self._prefill_tokens = 0
        return decode, ForwardMode.DECODE

    def _plan_decode(self) -> list[Piece]:
        """A token of each running request, of the longest unserved ones if too many run."""
        chosen = [r for r in self.running.values() if not r.is_prefilling]
        if len(chosen) > self._chunk:
            chosen = chosen[: self._chunk]
            for request in chosen:
                self.running[request.number] = self.running.pop(request.number)
        chosen.sort(key=lambda request: request.number)
        pieces = [Piece(request, request.computed, 1) for request in chosen]
        if not pieces or self._extend(pieces):
            return pieces
        fitting = []
        # Oldest first: whom one retracts for its slot is younger, and has no piece yet.
        for piece in pieces:
            if piece.request.row is not None and self._make_room([piece.request]):
                self._extend([piece])
                fitting.append(piece)
        return fitting

    def _plan_prefill(self) -> list[Piece]:
        """The prompt in chunks and waiting ones that fit; each has half of what both want.

        A prompt of at most one forward is never cut, but to save a state: then the rest of it is
        in the next forward. One of more than half a forward would wait for the half, so every
        second forward the waiting go first.
        """
        begun = self._make_room([r for r in self.running.values() if r.is_prefilling])
        long = next((r for r in begun if len(r.ids) > self._chunk), None)
        rests = [self._piece(r, r.remaining) for r in begun if r is not long]
        budget = self._chunk - sum(piece.count for piece in rests)
        share = 0
        if long is not None:
            self._long_first = not self._long_first
            if not self.waiting or self._long_first:
                share = min(long.remaining, -(-self._chunk // 2))
        pieces = rests + self._admit(budget - share, long is not None)
        if long is not None:
            left = self._chunk - sum(piece.count for piece in pieces)
            if left:
                pieces.append(self._piece(long, min(long.remaining, left)))
        if pieces and not self._extend(pieces):
            raise RuntimeError("a prefill was planned for which there are no slots: a bug")
        return pieces

    def _admit(self, budget: int, chunking: bool) -> list[Piece]:
        """Take requests from the queue, the oldest first, while ``budget`` and memory last.

        A request that waits for its turn to be chunked is overtaken, and so for one forward is one
        whose beginning is about to be cached. One that waits for memory is not, or it might wait
        for ever.
        """
        if not self.waiting:
            return []
        kv, table, waiting = self.kv, self.kv.table, self.waiting
        promised = sum(
            self._promised(request, int(table.lengths[held(request)]))
            for request in self.running.values()
        )
        available = kv.available_pages
        pieces: list[Piece] = []
        begun: dict[tuple[int, ...], list[Piece]] = {}  # by their first tokens
        place = 0
        while budget > 0 and place < len(waiting) and table.available_rows:
            request = waiting[place]
            is_long = len(request.ids) > self._chunk
            head = self._head(request)
            alike = begun.get(head)
            if (is_long and chunking) or (alike and self._soon_cached(request, alike)):
                place += 1
                continue
            request.row, cached = kv.acquire(request.reusable)
            if cached:  # what was evictable is locked now
                available = kv.available_pages
            needed, remaining = self._promised(request, cached), len(request.ids) - cached
            if promised + needed > available or (remaining > budget and not is_long):
                kv.release(request.row)
                request.row = None
                break
            del waiting[place]
            self.running[request.number] = request
            self._begin(request, cached)
            piece = self._piece(request, min(remaining, budget))
            pieces.append(piece)
            if head:
                begun.setdefault(head, []).append(piece)
            promised += needed
            # A prompt that is cut has the rest of its tokens in the next forward.
            budget -= piece.count if is_long else remaining
            chunking |= is_long
        return pieces

    def _head(self, request: Request) -> tuple[int, ...]:
        """The tokens that prompts must have in common for one to wait for another's; () if none
        waits."""
        if self.kv.cache is None or not request.use_cache:
            return ()
        return tuple(request.ids[: max(WORTH_WAITING, self.kv.page_size)])

    def _soon_cached(self, request: Request, pieces: Sequence[Piece]) -> bool:
        """Whether one of ``pieces``, which begin as ``request``, is worth waiting for.

        A state is saved where a piece ends, so with states it must end where both are the same.
        """
        ids, limit, page = request.ids, len(request.reusable), self.kv.page_size
        least = max(WORTH_WAITING, page)
        if limit < least:
            return False
        for piece in pieces:
            other, end = piece.request, piece.end
            if self.kv.states is None:
                soon = piece.completes and piece.start < least
            else:
                whole = end <= limit and end % page == 0
                soon = whole and piece.count >= least and other.ids[:end] == ids[:end]
            if soon:
                return True
        return False

    def _begin(self, request: Request, cached: int) -> None:
        request.computed = cached
        if request.wants_prompt_logprobs:
            del request.prompt_logprobs[cached:]
        if not request.started:
            request.started = True
            request.cached_tokens = cached
            self.statistics.prompt_tokens += request.prompt_len
            self.statistics.cached_tokens += cached

    def _promised(self, request: Request, length: int) -> int:
        """Pages that a request with ``length`` slots may take before it could be in need."""
        end = min(len(request.ids) + self._headroom, request.max_cached)
        pages_for = self.kv.table.allocator.pages_for
        return pages_for(end) - pages_for(length) if end > length else 0

    def _make_room(self, requests: list[Request]) -> list[Request]:
        """Retract the youngest until what is left of ``requests`` can be in a forward together."""
        pages = self.kv.table.pages_to_extend
        while (
            sum(pages(held(r), min(r.remaining, self._chunk)) for r in requests)
            > self.kv.available_pages
        ):
            youngest = self.running[max(self.running)]
            self._retract(youngest)
            requests = [request for request in requests if request is not youngest]
        return requests

    def _retract(self, request: Request) -> None:
        """Take back all that a running request holds, and queue it by its age."""
        self._release([(request, False)])
        request.computed = 0
        place = sum(1 for other in self.waiting if other.number < request.number)
        self.waiting.insert(place, request)
        self.statistics.retractions += 1

    def _piece(self, request: Request, count: int) -> Piece:
        """The next ``count`` tokens, or those up to where a state is missing.

        That is where a prompt parts from another with the same beginning; it is passed once.
        """
        if self.kv.states is None:
            return Piece(request, request.computed, count)
        cut = self.kv.branch(held(request)) - request.computed
        return Piece(request, request.computed, cut if WORTH_CUTTING <= cut < count else count)

    def _extend(self, pieces: Sequence[Piece]) -> bool:
        """Slots for all ``pieces``, or for none."""
        rows = np.array([held(piece.request) for piece in pieces])
        return self.kv.extend_each(rows, np.array([piece.count for piece in pieces])) is not None

    # Running.

    def _take_result(
        self, work: Work, result: ForwardResult, ms: Callable[[], float]
    ) -> list[Update]:
        self._verification = result.verification
        is_prefill, stateful = work.mode is ForwardMode.PREFILL, self.kv.states is not None
        # First all that depends on no result, while the device still works at it.
        for piece in work.pieces:
            request = piece.request
            request.computed += piece.count
            if is_prefill and not request.num_new:
                request.dispatch = result.dispatch
            # A state is there only now, where the piece ends.
            if is_prefill and request.use_cache and (piece.completes or stateful):
                self.kv.share(held(request), request.ids[: request.computed])
        others = [piece for piece in work.pieces if piece.request.want is not Want.TOKENS]
        whole = [piece.request for piece in others if piece.completes]
        self._finish([(request, "stop") for request in whole])
        updates = [Update(request) for request in whole]
        try:
            outputs = take_result(work.pieces, result)
        except Exception as error:
            for request in whole:
                request.finish_reason, request.error = "error", error
            raise
        ended: list[tuple[Request, FinishReason]] = []
        for request, token, logprob in outputs:
            reason = self._take(request, token, logprob)
            if reason is not None:
                ended.append((request, reason))
            news = (token, logprob) if reason != "error" else ()
            updates.append(Update(request, *news))
        self._finish(ended)
        if is_prefill:
            self.statistics.record_prefill(LastPrefill.of(result, ms()))
        else:
            self.statistics.record_decode(result.dispatch.reason.value)
        return updates

    def _take(
        self, request: Request, token: int, logprob: TokenLogprob | None
    ) -> FinishReason | None:
        """Append a token; why the request ends, if that was its last or looking at it fails."""
        request.append(token, logprob)
        self.statistics.generated_tokens += 1
        full = len(request.ids) >= request.max_len
        if request.rule is None:
            return "length" if full else None
        try:
            return request.rule.check(request.ids, request.num_new, full)
        except Exception as error:
            request.error = error
            return "error"

    def _finish(self, ended: Sequence[tuple[Request, FinishReason]]) -> None:
        for request, _ in ended:
            if request.row is None:
                self.waiting.remove(request)
        self._release([(r, reason == "error") for r, reason in ended if r.row is not None])
        for request, reason in ended:
            request.finish_reason = reason
        self.statistics.prompts += len(ended)

    def _release(self, requests: Sequence[tuple[Request, bool]]) -> None:
        """Give back all that running requests hold; of each, whether its forward failed."""
        if not requests:
            return
        # ``computed`` counts forwards that came to their end, so it is good after an error too.
        self.kv.release_each(
            [(held(r), r.ids[: r.computed] if r.use_cache else (), bad) for r, bad in requests]
        )
        for request, _ in requests:
            request.row = None
            del self.running[request.number]
