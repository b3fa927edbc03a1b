"""The forwards that prompts would take, planned by the scheduler itself on tables of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from breakgraph.engine.batching import Runner
from breakgraph.engine.data_parallel import make_scheduler
from breakgraph.engine.request import Request
from breakgraph.forward import ForwardBatch, RankCounts
from breakgraph.memory import MambaPool, RankMemory
from breakgraph.runner.buckets import Dispatch, DispatchReason
from breakgraph.runner.forward_result import ForwardResult


class _Recorder:
    """Takes a runner's place, with pools of the same sizes, and runs nothing."""

    def __init__(self, runner: Runner) -> None:
        memory = [RankMemory(memory.table).like() for memory in runner.rank_memory]
        self.rank_memory, self.requests = memory, memory[0].table
        self.ranked = None if runner.ranked is None else self
        self.chunk_size = runner.chunk_size
        self.device = torch.device("cpu")
        self.mamba_pool: MambaPool | None = None
        self.batches: list[ForwardBatch] = []

    def forward(self, batch: ForwardBatch, *, allow_graph: bool = True) -> ForwardResult:
        self.batches.append(batch)
        return ForwardResult(Dispatch(None, DispatchReason.DISABLED, batch.num_tokens))

    def run(self, batches: Sequence[ForwardBatch], *, allow_graph: bool) -> list[ForwardResult]:
        result = self.forward(RankCounts.of(batches).widest(), allow_graph=allow_graph)
        return [result] * len(batches)


def dry_run(runner: Runner, requests: Sequence[Request]) -> list[ForwardBatch]:
    """The batches of ``requests``, which are for ``Want.NOTHING``, with no prefix cached.

    Where ranks hold different requests, a batch as wide as the widest of each forward.
    """
    recorder = _Recorder(runner)
    scheduler = make_scheduler(recorder, cache_prefixes=False)
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    return recorder.batches
