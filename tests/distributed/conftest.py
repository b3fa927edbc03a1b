"""Ranks that are started once for all tests of a module, and that engines then find running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pair import Pair


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
