"""Ranks that are started once for all tests of a module, and that engines then find running."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pair import Pair

from breakgraph.forward import ForwardBatch, RankCounts
from breakgraph.runner.buckets import Dispatch
from breakgraph.runner.data_parallel import RankedForward


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two ranks, or as many as a test is given."""
    pair = Pair(getattr(request, "param", 2))
    yield pair
    pair.stop()


@pytest.fixture
def in_pair(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's ranks are those of ``pair``."""
    pair.fails = None
    monkeypatch.setattr("breakgraph.engine.engine.start_ranks", pair.start_ranks)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RankCounts, int | None]]:
    """The counts of every forward of ranks, and its bucket."""
    found: list[tuple[RankCounts, int | None]] = []
    real = RankedForward._run

    def run(self: RankedForward, batch: ForwardBatch, counts: RankCounts, how: Dispatch) -> Any:
        found.append((counts, how.bucket))
        return real(self, batch, counts, how)

    monkeypatch.setattr(RankedForward, "_run", run)
    return found
