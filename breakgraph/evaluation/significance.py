"""Two textbook statistics, exact and without a dependency."""

from __future__ import annotations

from math import sqrt

Z95 = 1.959963984540054


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927); sound also near 0 and 1."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, Z95**2
    centre = share + z2 / (2 * total)
    half = Z95 * sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test (McNemar, 1947), from the questions one way alone got
    right: how likely so uneven a split is where both ways are as good.
    """
    n = only_first + only_second
    ways = tail = 1
    for i in range(min(only_first, only_second)):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)
