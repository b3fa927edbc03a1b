"""What a prefill costs eagerly and replayed, as measured once the graphs are captured.

Small batches are bound by launches, and a replay is up to 3.5 times as fast; large ones are bound
by the GPU, and there a replay gains 1 to 3 % where padding to the bucket costs up to 12. Which is
which depends on model, GPU and host, so it is measured and not guessed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.97
"""Where an octave lies between the sizes measured, times are known to about 3 %: a replay must win
by more."""


@dataclass(frozen=True, slots=True)
class Line:
    """Milliseconds by rows, linear between the sizes measured.

    Attributes:
        rows: the sizes measured, ascending.
        ms: of a forward of that many rows.
    """

    rows: tuple[int, ...]
    ms: tuple[float, ...]

    def at(self, rows: int) -> float:
        """At ``rows``; the nearest size's where all lie to one side."""
        index = bisect_left(self.rows, rows)
        if index == 0 or index == len(self.rows):
            return self.ms[min(index, len(self.rows) - 1)]
        low, high = self.rows[index - 1 : index + 1]
        share = (rows - low) / (high - low)
        return self.ms[index - 1] + share * (self.ms[index] - self.ms[index - 1])


@dataclass(frozen=True, slots=True)
class ForwardTimes:
    """Milliseconds of one way to run a forward.

    Attributes:
        one: of one request.
        more: what it takes more, or less, to have the rows in ``requests`` requests; None where
            that was not measured.
        requests: at least 2, of which ``more`` is.
    """

    one: Line
    more: Line | None = None
    requests: int = 2

    def at(self, rows: int, requests: int = 1, tokens: int | None = None) -> float:
        """With ``requests`` equal ones; infinite past the largest size measured.

        Attention over n equal requests is 1 / n of that over one, so what n of them change is
        taken to be a share of ``1 - 1 / n``. What they save tells, then, what attention takes, and
        of that ``tokens``, if the rows behind them are padding, take their share squared.
        """
        if rows > self.one.rows[-1]:
            return math.inf
        ms = self.one.at(rows)
        if self.more is not None:
            change = self.more.at(rows) / (1 - 1 / self.requests)
            ms += min(1 - 1 / requests, 1 - 1 / self.requests) * change
            if tokens is not None:
                ms += min(change, 0.0) / requests * (1 - (tokens / rows) ** 2)
        return ms


@dataclass(frozen=True, slots=True)
class PrefillCosts:
    """What decides between an eager forward and a replay.

    Attributes:
        eager: of an eager forward, by its tokens.
        replay: of a replay, by its bucket.
        margin: a replay must take less than this share of the eager time.
    """

    eager: ForwardTimes
    replay: ForwardTimes
    margin: float = MARGIN

    def replay_pays(self, num_tokens: int, bucket: int, requests: int = 1) -> bool:
        """Whether ``num_tokens`` run faster replayed in ``bucket`` than eagerly."""
        replay = self.replay.at(bucket, requests, num_tokens)
        if num_tokens == bucket and self.margin < 1:  # the same work, known to that margin
            return replay < math.inf
        return replay <= self.margin * self.eager.at(min(num_tokens, self.last), requests)

    @property
    def last(self) -> int:
        """The largest size with an eager time."""
        return self.eager.one.rows[-1]


def anchors(buckets: Sequence[int]) -> list[int]:
    """The ends of the ladder, and the first bucket of each octave between."""
    found = [buckets[0]]
    for bucket in buckets:
        if bucket >= 2 * found[-1]:
            found.append(bucket)
    return found if found[-1] == buckets[-1] else [*found, buckets[-1]]
