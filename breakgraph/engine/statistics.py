"""What an engine has done so far: which forwards were replayed, why the others were not."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from breakgraph.runner.forward_result import ForwardResult


@dataclass(frozen=True, kw_only=True, slots=True)
class LastPrefill:
    """How a prefill forward ran.

    Attributes:
        tokens: its tokens, padding not counted.
        bucket: of the graph that was replayed; None when it ran eagerly.
        reason: why it was replayed or not.
        mode: how it ran: "eager", or the kind of graphs that replayed it.
        text: the decision in a sentence.
        segments: of that graph; 0 when eager.
        breaks: of that graph; 0 when eager.
        padding_rows: rows replayed beyond its tokens.
        ms: milliseconds it took.
    """

    tokens: int
    bucket: int | None
    reason: str
    text: str
    mode: str = "eager"
    segments: int = 0
    breaks: int = 0
    padding_rows: int = 0
    ms: float = 0.0

    @staticmethod
    def of(result: ForwardResult, ms: float) -> LastPrefill:
        """The forward that gave ``result`` in ``ms``."""
        dispatch, graph = result.dispatch, result.graph
        bucket, tokens = dispatch.bucket, dispatch.num_tokens
        return LastPrefill(
            tokens=tokens,
            bucket=bucket,
            reason=dispatch.reason.value,
            text=dispatch.describe(),
            mode="eager" if bucket is None else dispatch.kind,
            segments=0 if graph is None else graph.num_segments,
            breaks=0 if graph is None else graph.num_breaks,
            padding_rows=0 if bucket is None else bucket - tokens,
            ms=ms,
        )


@dataclass(slots=True)
class Statistics:
    """Counts since the engine started.

    Attributes:
        prompts: prompts answered, or ended otherwise.
        prompt_tokens: tokens of the prompts that ran.
        cached_tokens: those of them that were found in the prefix cache.
        generated_tokens: tokens sampled.
        retractions: times that a running request had to give back its slots for a while.
        decodes: decode forwards.
        buckets: per bucket its prefill replays.
        reasons: per dispatch reason its prefill forwards.
        modes: per way to run its prefill forwards.
        decode_reasons: per dispatch reason its decode forwards.
        replayed_tokens: tokens of replayed prefills, padding not counted.
        eager_ms: milliseconds in eager prefill forwards, all together.
        replayed_ms: milliseconds in replayed prefill forwards, all together.
        last_prefill: the latest prefill forward.
        first_token_at: when the first prefill that gave a token was done, by
            ``time.perf_counter()``.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retractions: int = 0
    decodes: int = 0
    buckets: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    decode_reasons: Counter[str] = field(default_factory=Counter)
    replayed_tokens: int = 0
    eager_ms: float = 0.0
    replayed_ms: float = 0.0
    last_prefill: LastPrefill | None = None
    first_token_at: float | None = None

    @property
    def prefills(self) -> int:
        """Prefill forwards."""
        return self.reasons.total()

    @property
    def replays(self) -> int:
        """Prefill forwards that were replayed from a graph."""
        return self.buckets.total()

    @property
    def padding(self) -> float:
        """Padded rows as a share of all rows replayed, 0 to 1."""
        rows = sum(bucket * count for bucket, count in self.buckets.items())
        return 1 - self.replayed_tokens / rows if rows else 0.0

    def record_prefill(self, prefill: LastPrefill) -> None:
        """Count a prefill forward."""
        self.last_prefill = prefill
        if self.first_token_at is None and self.generated_tokens:
            self.first_token_at = time.perf_counter()
        self.reasons[prefill.reason] += 1
        self.modes[prefill.mode] += 1
        if prefill.bucket is None:
            self.eager_ms += prefill.ms
        else:
            self.buckets[prefill.bucket] += 1
            self.replayed_tokens += prefill.tokens
            self.replayed_ms += prefill.ms

    def record_decode(self, reason: str) -> None:
        """Count a decode forward."""
        self.decodes += 1
        self.decode_reasons[reason] += 1
