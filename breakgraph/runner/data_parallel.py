"""One forward of groups of ranks that hold different requests (``--dp-size``).

Every group runs the whole model but the experts on rows of its own, as many rows as any other:
those of the bucket, or of the group with the most tokens, so that the experts' collectives are of
one size. Whether there is a bucket is decided on every rank by the counts of all. Behind the layer
stack one row a request goes to rank 0's group, which makes the logits: a hidden state is a
hundredth of the logits made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from breakgraph.distributed.collectives import uncounted
from breakgraph.forward import ForwardBatch, RankCounts
from breakgraph.layers.moe_experts import Experts
from breakgraph.runner.buckets import Dispatch
from breakgraph.runner.forward_result import ForwardResult

if TYPE_CHECKING:
    from breakgraph.models import PrefillModel
    from breakgraph.runner.model_runner import ModelRunner


def check_model(model: PrefillModel) -> None:
    """Raise ValueError where ``--dp-size`` cannot serve ``model``, or has no use."""
    if not any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError(
            f"{model.architecture} has no experts that ranks could share, so --dp-size would only "
            "make copies wait for each other: start a server for each copy, or divide the model "
            "by --tp-size alone"
        )


class RankedForward:
    """Runs a batch of each group in one forward.

    Args:
        runner: of this rank.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    @torch.no_grad()
    def run(self, batches: Sequence[ForwardBatch], *, allow_graph: bool) -> list[ForwardResult]:
        """On rank 0: run the batches of all groups, which have one mode.

        Args:
            batches: in the order of the groups, the last ones left out where they are idle.
            allow_graph: as for ``ModelRunner.forward``.

        Returns:
            What each gives, on this rank's device; of an idle group no rows.

        Raises:
            ValueError, RankFailedError: as ``ModelRunner.forward``; no batch has run, or all end.
        """
        runner = self._runner
        for batch in batches:
            if batch.num_tokens:
                runner.check(batch)
        idle = ForwardBatch.idle(batches[0].mode)
        batches = [*batches, *[idle] * (len(runner.rank_memory) - len(batches))]
        counts = RankCounts.of(batches)
        dispatch = runner.dispatch(counts.widest(), allow_graph=allow_graph)
        with runner.leading(batches, dispatch, allow_graph):
            return self._run(batches[0], counts, dispatch)

    @torch.no_grad()
    def follow(self, batch: ForwardBatch, counts: RankCounts, *, allow_graph: bool) -> Dispatch:
        """On another rank: run the ``batch`` of its group; returns what it decided by the counts
        of all."""
        dispatch = self._runner.dispatch(counts.widest(), allow_graph=allow_graph)
        self._run(batch, counts, dispatch)
        return dispatch

    def _run(
        self, batch: ForwardBatch, counts: RankCounts, dispatch: Dispatch
    ) -> list[ForwardResult]:
        runner, group = self._runner, self._runner.group
        stack = runner.run_stack(batch, dispatch, counts.rows)
        hidden, filled = stack.hidden[: batch.num_tokens], stack.filled
        if not runner.args.is_embedding:
            mine = hidden.index_select(0, filled.last_rows)
        elif batch.num_tokens:
            mine = runner.pooler(hidden, filled.extend_lens)
        else:
            mine = hidden.float()
        rows = self._of_groups(mine, counts.requests)
        logprobs = None
        if counts.with_logprobs:
            known = hidden.new_zeros(0, dtype=torch.float32)
            if filled.logprob_targets is not None:
                head = runner.model.logits_head
                with uncounted():
                    known = runner.logits.target_logprobs(hidden, head, filled.logprob_targets)
            logprobs = self._of_groups(known, counts.tokens)
        if group.dp_rank:
            return []
        results = [
            ForwardResult(replace(dispatch, num_tokens=tokens), graph=stack.graph)
            for tokens in counts.tokens
        ]
        if runner.args.is_embedding:
            return [replace(r, pooled=part) for r, part in zip(results, rows, strict=True)]
        with uncounted():
            logits = runner.logits.logits(torch.cat(rows), runner.model.logits_head)
        parts = logits.split(list(counts.requests))
        if logprobs is not None:
            pairs = zip(results, logprobs, strict=True)
            results = [replace(r, input_token_logprobs=row) for r, row in pairs]
        return [replace(r, next_token_logits=p) for r, p in zip(results, parts, strict=True)]

    def _of_groups(self, mine: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """What the ranks of each group have alike, ``[count, ...]``, of every group."""
        group = self._runner.group
        gathered = group.gather_padded(mine, max(counts))[:: group.attention.size]
        return [part[:count] for part, count in zip(gathered, counts, strict=True)]
