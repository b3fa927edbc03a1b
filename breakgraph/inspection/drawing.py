"""SVG by hand: shapes with classes, coloured by the page's style sheet, in light and in dark.

A canvas grows as it is drawn on and knows its height at the end. Everything written into it is
escaped here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 1160
GUTTER = 112
"""Left of every plot, for the names of its lanes."""
_CHARACTER = 5.7
"""Pixels that a character of a label takes at 11 px, on average; a little too many."""
_HAIR = 0.5
"""Pixels below which a block becomes one with a neighbour of its class, up to twice as many."""


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a lane.

    Attributes:
        start, end: on the plot's axis.
        style: CSS class.
        label: shown inside, where there is room.
        title: shown on hovering.
    """

    start: float
    end: float
    style: str
    label: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """From the values ``[0, last]`` of an axis to pixels."""

    last: float
    left: float = GUTTER
    right: float = WIDTH - 8

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / max(self.last, 1e-9)


class Canvas:
    """Shapes, from the top down."""

    def __init__(self, label: str, width: float = WIDTH) -> None:
        self.height = 0.0
        self._width, self._label = width, label
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, title: str = ""
    ) -> None:
        inside = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(
            f'<rect class="{escape(style)}" x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.1):.2f}" '
            f'height="{height:.1f}">{inside}</rect>'
        )
        self._reach(y + height)

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        self._parts.append(
            f'<text class="{escape(style)}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )
        self._reach(y + 4)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self._parts.append(
            f'<line class="{escape(style)}" x1="{x1:.1f}" y1="{y1:.1f}" '
            f'x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )
        self._reach(max(y1, y2))

    def lane(
        self,
        y: float,
        height: float,
        name: str,
        blocks: Iterable[Block],
        scale: Scale,
        end: float | None = None,
    ) -> None:
        """A row of blocks over a bare track up to ``end``; what lies past the scale is cut."""
        self.text(scale.left - 8, y + height / 2 + 4, name, "name", "end")
        until = scale.last if end is None else min(end, scale.last)
        self.rect(scale.left, y, scale.x(until) - scale.left, height, "track")
        for block in _joined(blocks, scale):
            x, right = scale.x(block.start), scale.x(min(block.end, scale.last))
            self.rect(x, y, right - x, height, block.style, block.title)
            if block.label and len(block.label) * _CHARACTER + 4 <= right - x:
                middle = (x + right) / 2
                self.text(middle, y + height / 2 + 4, block.label, f"on-{block.style}", "middle")

    def axis(self, y: float, scale: Scale, unit: str, up: float = 0.0) -> None:
        """Round values under a plot, with hairlines ``up`` pixels high above them."""
        for value in ticks(scale.last):
            self.line(scale.x(value), y - up, scale.x(value), y + 4, "tick")
            said = f"{value:g}" + (f" {unit}" if value == 0 else "")
            self.text(scale.x(value), y + 16, said, "small", "middle")

    def svg(self) -> str:
        height = math.ceil(self.height) + 2
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width:g} {height}" '
            f'width="{self._width:g}" height="{height}" role="img" '
            f'aria-label="{escape(self._label)}">{"".join(self._parts)}</svg>'
        )

    def _reach(self, y: float) -> None:
        self.height = max(self.height, y)


def ticks(last: float, most: int = 10) -> list[float]:
    """At most about ``most`` round values from 0 to ``last``: steps of 1, 2 or 5 times a power."""
    if not last > 0:
        return [0.0]
    rough = last / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(at * step, 10) for at in range(int(last / step + 1e-9) + 1)]


def _joined(blocks: Iterable[Block], scale: Scale) -> Sequence[Block]:
    """Blocks within the scale; slivers beside others of their class become one with them."""
    kept: list[Block] = []
    for block in sorted(blocks, key=lambda block: block.start):
        if block.start >= scale.last:
            continue
        before = kept[-1] if kept else None
        if (
            before is not None
            and before.style == block.style
            and scale.x(block.end) - scale.x(block.start) < _HAIR
            and scale.x(block.end) - scale.x(before.start) < 2 * _HAIR
        ):
            title = before.title if before.title.endswith("…") else f"{before.title} …"
            kept[-1] = Block(before.start, block.end, before.style, before.label, title)
        else:
            kept.append(block)
    return kept
