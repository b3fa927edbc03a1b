"""What an engine has done so far: which forwards were replayed, why the others were not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Statistics:
    """Counts since the engine started.

    Attributes:
        prompts: prompts answered.
        prompt_tokens: tokens of prefill forwards, padding not counted.
        generated_tokens: tokens sampled.
        decodes: decode forwards.
        buckets: per bucket its prefill replays.
        reasons: per dispatch reason its prefill forwards.
        replayed_tokens: tokens of replayed prefills, padding not counted.
        eager_ms: milliseconds in eager prefill forwards, all together.
        replayed_ms: milliseconds in replayed prefill forwards, all together.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decodes: int = 0
    buckets: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    replayed_tokens: int = 0
    eager_ms: float = 0.0
    replayed_ms: float = 0.0

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

    def record_prefill(self, bucket: int | None, reason: str, tokens: int, ms: float) -> None:
        """Count a prefill forward of ``tokens`` that took ``ms``; ``bucket`` None when eager."""
        self.reasons[reason] += 1
        self.prompt_tokens += tokens
        if bucket is None:
            self.eager_ms += ms
        else:
            self.buckets[bucket] += 1
            self.replayed_tokens += tokens
            self.replayed_ms += ms
