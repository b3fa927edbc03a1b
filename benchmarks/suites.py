"""What each suite measures: shapes, tokens, batch sizes, and how a time budget is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One model of a suite.

    Attributes:
        name: of its configuration in ``benchmarks/shapes``.
        weight: its share of the time, beside those of the others.
        flags: of the engine, besides those of the suite.
        ladders: how many buckets are captured to see what capturing costs, besides the sweep's.
        peers: whether the class of transformers is measured too.
    """

    name: str
    weight: float = 1.0
    flags: Mapping[str, Any] = field(default_factory=dict)
    ladders: tuple[int, ...] = ()
    peers: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Shapes, and what is measured of each.

    Attributes:
        shapes: in the order they run.
        tokens: of a prefill, ascending; each is a bucket, so no row is padded.
        between: token counts that are no bucket, measured with one request.
        batch_sizes: the most telling first: what time does not allow is left out at the end.
        peer_tokens: at which transformers is measured.
        seconds: the default budget of a run.
        repeats: most timed prefills of a mode and row.
        row_ms: what a row may take, from which its repeats follow; never fewer than two.
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    between: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    peer_tokens: tuple[int, ...]
    seconds: float
    repeats: int
    row_ms: float


H200 = Suite(
    shapes=(
        Shape(name="qwen3-0.6b", weight=1.3, ladders=(1, 14, 56), peers=True),
        Shape(name="qwen3-8b", weight=1.3, ladders=(1, 56), peers=True),
        Shape(name="nemotron-h-8b", weight=1.2, flags={"linear_attention_capture": 8}),
        Shape(name="qwen3-30b-a3b", weight=1.0),
    ),
    tokens=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    between=(100, 300, 769, 1500, 3000),
    batch_sizes=(1, 8, 32, 4),
    peer_tokens=(16, 128, 512, 1024, 2048, 4096, 8192),
    seconds=330.0,
    repeats=15,
    row_ms=600.0,
)

CPU = Suite(
    shapes=(
        Shape(name="tiny-qwen3", ladders=(1, 4), peers=True),
        Shape(name="tiny-nemotron-h", flags={"linear_attention_capture": 4}),
        Shape(name="tiny-qwen3-moe"),
    ),
    tokens=(16, 32, 64),
    between=(24, 50),
    batch_sizes=(1, 4),
    peer_tokens=(16, 64),
    seconds=30.0,
    repeats=3,
    row_ms=400.0,
)

SUITES: dict[str, Suite] = {"h200": H200, "cpu": CPU}
