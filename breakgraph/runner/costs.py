"""What a prefill costs eagerly and replayed, measured once the graphs are captured.

Small batches are bound by launches, and a replay is up to 3.5 times as fast; large ones are bound
by the GPU, and there a replay gains 1 to 3 % where padding to the bucket costs up to 12. Which is
which depends on model, GPU and host, so it is measured and not guessed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.97
"""Between the sizes measured, times are known to about 3 %: a replay must win by more."""


@dataclass(frozen=True, slots=True)
class PrefillCosts:
    """Milliseconds of a forward by its rows, linear between the sizes measured.

    Attributes:
        tokens: the sizes measured, ascending.
        eager_ms: of an eager forward of that many tokens.
        replay_ms: of a replay of a bucket of that many.
    """

    tokens: tuple[int, ...]
    eager_ms: tuple[float, ...]
    replay_ms: tuple[float, ...]

    def replay_pays(self, num_tokens: int, bucket: int) -> bool:
        """Whether ``num_tokens`` run faster replayed in ``bucket`` than eagerly."""
        if num_tokens == bucket:
            return True
        replay = _interpolate(bucket, self.tokens, self.replay_ms)
        return replay <= MARGIN * _interpolate(num_tokens, self.tokens, self.eager_ms)


def anchors(buckets: Sequence[int]) -> list[int]:
    """The buckets to measure: the ends of the ladder, and the first of each octave between."""
    found = [buckets[0]]
    for bucket in buckets:
        if bucket >= 2 * found[-1]:
            found.append(bucket)
    return found if found[-1] == buckets[-1] else [*found, buckets[-1]]


def _interpolate(at: int, xs: Sequence[int], ys: Sequence[float]) -> float:
    index = bisect_left(xs, at)
    if index == 0 or index == len(xs):
        return ys[min(index, len(xs) - 1)]
    share = (at - xs[index - 1]) / (xs[index] - xs[index - 1])
    return ys[index - 1] + share * (ys[index] - ys[index - 1])
