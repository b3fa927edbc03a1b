"""Which graphs of the prefill ladders are worth their memory.

A graph pays by what the batches in its bucket lose without it: they take the next larger bucket, a
graph of another kind, or run eagerly, whichever is least. Losses are shares of the time with all
graphs, by the measured costs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from breakgraph.runner.buckets import BUCKET_FLOOR, bucket_for
from breakgraph.runner.costs import ForwardTimes, Line, PrefillCosts
from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner

WORTH = 0.01
"""What a graph must save; times are known to about as much."""

STAND_IN = {"full": 0.9, "captured": 0.95, "breakable": 1.0}
"""Where nothing is measured, what a replay costs a row; an eager forward costs 2. What counts is
then padding."""


class Graph(NamedTuple):
    """One graph of the ladders."""

    kind: str
    bucket: int


class Ladders:
    """What is captured of every kind, and what it saves.

    Args:
        runners: in order of preference; a batch that one kind serves, those after it serve too.
    """

    def __init__(self, runners: Sequence[PrefillGraphRunner]) -> None:
        self._runners = {runner.kind: runner for runner in runners}
        self._costs = {runner.kind: runner.costs or _stand_in(runner) for runner in runners}
        self.all = frozenset(
            Graph(runner.kind, bucket) for runner in runners for bucket in runner.buckets
        )

    def worthless(self) -> list[Graph]:
        """Graphs that save next to nothing over the others."""
        kept, found = set(self.all), []
        for kind in reversed(self._runners):
            for graph in sorted(graph for graph in self.all if graph.kind == kind):
                if self.loss(graph, kept) < WORTH:
                    kept.remove(graph)
                    found.append(graph)
        return found

    def over_budget(
        self, own_bytes: Mapping[Graph, int], pool_bytes: int, budget: int
    ) -> list[Graph]:
        """Graphs to drop, those first that lose least for each byte.

        The pool is as large as the largest bucket needs, taken to be in proportion to its rows: so
        all graphs of that bucket go together, or one for what lies outside of the pool alone.
        """
        most = max(graph.bucket for graph in self.all)

        def taken(graphs: Collection[Graph]) -> float:
            top = max((graph.bucket for graph in graphs), default=0)
            return sum(own_bytes[graph] for graph in graphs) + pool_bytes * top / most

        kept, dropped = self.all, list[Graph]()
        while kept and taken(kept) > budget:
            top = max(graph.bucket for graph in kept)
            choices = [frozenset([graph]) for graph in sorted(kept)]
            choices.append(frozenset(graph for graph in kept if graph.bucket == top))
            prices = [
                (sum(self.loss(graph, kept) for graph in choice) + 1e-9)
                / max(taken(kept) - taken(kept - choice), 1e-9)
                for choice in choices
            ]
            cheapest = choices[prices.index(min(prices))]
            kept -= cheapest
            dropped += sorted(cheapest)
        return dropped

    def loss(self, graph: Graph, kept: Iterable[Graph]) -> float:
        """The most that a batch in the graph's bucket loses if it goes too, of those ``kept``."""
        kinds = list(self._runners)
        kinds = kinds[kinds.index(graph.kind) :]
        with_it, runner = set(kept), self._runners[graph.kind]
        below = max((g.bucket for g in with_it if g.kind == graph.kind and g < graph), default=0)
        # The fewest tokens of a bucket may be too few for the next one's padding.
        spans = zip((0, *runner.ladder), runner.ladder, strict=False)
        sizes = [n for a, b in spans if below < b <= graph.bucket for n in (a + 1, b)]
        many = self._costs[graph.kind].eager.requests
        return max(
            self._ms(size, requests, kinds, with_it - {graph})
            / self._ms(size, requests, kinds, self.all)
            - 1
            for size in sizes
            for requests in (1, many)
        )

    def _ms(
        self, tokens: int, requests: int, kinds: Sequence[str], graphs: Iterable[Graph]
    ) -> float:
        """The least that ``tokens`` take with ``graphs``."""
        costs = self._costs[kinds[0]]
        best = costs.eager.at(min(tokens, costs.last), requests)
        for kind in kinds:
            bucket = bucket_for(sorted(g.bucket for g in graphs if g.kind == kind), tokens)
            limit = self._runners[kind].max_padding * max(tokens, BUCKET_FLOOR)
            if bucket is not None and bucket <= limit:
                best = min(best, self._costs[kind].replay.at(bucket, requests, tokens))
        return best


def _stand_in(runner: PrefillGraphRunner) -> PrefillCosts:
    rows = (1, runner.ladder[-1] + 1)

    def line(ms: float) -> ForwardTimes:
        return ForwardTimes(Line(rows, (ms, ms * rows[1])))

    return PrefillCosts(line(2.0), line(STAND_IN[runner.kind]))
