"""The forwards that prompts would take, planned by the scheduler itself on tables of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from breakgraph.engine.batching import Runner
from breakgraph.engine.request import Request
from breakgraph.engine.scheduler import Scheduler
from breakgraph.forward import ForwardBatch
from breakgraph.memory import MambaPool, RequestTable, SlotAllocator
from breakgraph.runner.buckets import Dispatch, DispatchReason
from breakgraph.runner.model_runner import ForwardResult


class _Recorder:
    """Takes a runner's place, with pools of the same sizes, and runs nothing."""

    def __init__(self, runner: Runner) -> None:
        table = runner.requests
        slots = SlotAllocator(table.allocator.num_tokens, table.allocator.page_size)
        self.requests = RequestTable(*table.table.shape, slots)
        self.chunk_size = runner.chunk_size
        self.device = torch.device("cpu")
        self.mamba_pool: MambaPool | None = None
        self.batches: list[ForwardBatch] = []

    def forward(self, batch: ForwardBatch, *, allow_graph: bool = True) -> ForwardResult:
        self.batches.append(batch)
        return ForwardResult(Dispatch(None, DispatchReason.DISABLED, batch.num_tokens))


def dry_run(runner: Runner, requests: Sequence[Request]) -> list[ForwardBatch]:
    """The batches of ``requests``, which are for ``Want.NOTHING``, with no prefix cached."""
    recorder = _Recorder(runner)
    scheduler = Scheduler(recorder, cache_prefixes=False)
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    return recorder.batches
