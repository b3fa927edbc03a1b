"""Which rank runs which request (``--dp-size``), and the one forward a step that all ranks run.

Each rank has a scheduler of its own here, over rank 0's account of its table and its pool; a
request stays with the rank that it is given to. A forward has one mode on all ranks: a decode if no
rank has a prompt to compute, else a prefill, which takes a decoding request as one more token of
it. So no rank waits for another's prompts, and the experts' collectives always meet. Ranks that
hold the same requests, one of the groups of --dp-size, are one rank here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from breakgraph.engine.batching import Clock, RankedRunner, Runner, Work
from breakgraph.engine.request import FinishReason, Request
from breakgraph.engine.scheduler import CacheUse, Scheduler, Update
from breakgraph.engine.statistics import Statistics
from breakgraph.forward import ForwardBatch, ForwardMode


def choose_rank(loads: Sequence[int], cached: Sequence[int]) -> int:
    """The rank for a new request: the least loaded, where a cached prefix counts as load saved.

    Args:
        loads: tokens that the requests of each rank may come to.
        cached: tokens of the new one's prompt in each rank's prefix cache.
    """
    return min(range(len(loads)), key=lambda rank: (loads[rank] - cached[rank], rank))


class RankedScheduler:
    """A scheduler for each rank, in step; used as ``Scheduler`` is.

    Attributes:
        ranks: the schedulers, in the order of the ranks.
        statistics: what has been done: a forward counts once for each rank that had work in it.
    """

    def __init__(
        self,
        runner: Runner,
        ranked: RankedRunner,
        *,
        statistics: Statistics | None = None,
        **options: Any,
    ) -> None:
        """``options`` are those of ``Scheduler``."""
        self.statistics = Statistics() if statistics is None else statistics
        options |= {"statistics": self.statistics, "numbers": itertools.count()}
        self.ranks = [Scheduler(runner, memory=each, **options) for each in runner.rank_memory]
        self._ranked = ranked
        self._loads = [0] * len(self.ranks)
        self._clock = Clock(runner.device)

    @property
    def has_work(self) -> bool:
        return any(rank.has_work for rank in self.ranks)

    @property
    def idle_and_empty(self) -> bool:
        return all(rank.idle_and_empty for rank in self.ranks)

    @property
    def num_waiting(self) -> int:
        return sum(rank.num_waiting for rank in self.ranks)

    @property
    def num_running(self) -> int:
        return sum(rank.num_running for rank in self.ranks)

    def cache_use(self) -> CacheUse:
        """How full the KV caches of all ranks are."""
        uses = [rank.cache_use() for rank in self.ranks]
        return CacheUse(*(sum(use[i] for use in uses) for i in range(3)))

    def forget(self) -> None:
        """Let go of all cached prefixes that nobody uses."""
        for rank in self.ranks:
            rank.forget()

    def add(self, request: Request) -> None:
        """Queue a request, on the rank that ``choose_rank`` says."""
        cached = [rank.kv.cached_prefix(request.reusable) for rank in self.ranks]
        request.rank = choose_rank(self._loads, cached)
        self._loads[request.rank] += request.max_len
        self.ranks[request.rank].add(request)

    def abort(self, request: Request, reason: FinishReason = "abort") -> list[Update]:
        """As ``Scheduler.abort``."""
        return self._settled(self.ranks[request.rank].abort(request, reason))

    def abort_all(self) -> list[Update]:
        """End every request."""
        return self._settled([update for rank in self.ranks for update in rank.abort_all()])

    def verify(self) -> None:
        """Nothing: no forward of ranks is run a second time."""

    def step(self) -> list[Update]:
        """Run one forward on all ranks, if any has work; as ``Scheduler.step``.

        A forward that raises ends the requests that all ranks had in it.
        """
        begun = [rank.begin() for rank in self.ranks]
        updates = [update for news, _ in begun for update in news]
        works = [work for _, work in begun]
        if any(works):
            updates += self._run(works)
        return self._settled(updates)

    def _run(self, works: Sequence[Work | None]) -> list[Update]:
        busy = [(rank, work) for rank, work in enumerate(works) if work is not None]
        decode = all(work.mode is ForwardMode.DECODE for _, work in busy)
        mode = ForwardMode.DECODE if decode else ForwardMode.PREFILL
        batches = [ForwardBatch.idle(mode)] * len(works)
        for rank, work in busy:
            batches[rank] = replace(work.batch, mode=mode)
        allow_graph = all(work.allow_graph for _, work in busy)
        try:
            self._clock.start()
            results = self._ranked.run(batches, allow_graph=allow_graph)
            self._clock.stop()
        except Exception as error:
            failed = [self.ranks[rank].fail(work.pieces, error) for rank, work in busy]
            return list(itertools.chain(*failed))
        ended = [self.ranks[rank].end(work, results[rank], self._clock.ms) for rank, work in busy]
        return list(itertools.chain(*ended))

    def _settled(self, updates: list[Update]) -> list[Update]:
        """``updates``, with what has ended taken from the loads."""
        for update in updates:
            if update.request.finish_reason is not None:
                self._loads[update.request.rank] -= update.request.max_len
        return updates


def make_scheduler(runner: Runner, **options: Any) -> Scheduler | RankedScheduler:
    """The scheduler of a runner, with the ``options`` of ``Scheduler``."""
    if runner.ranked is None:
        return Scheduler(runner, **options)
    return RankedScheduler(runner, runner.ranked, **options)
