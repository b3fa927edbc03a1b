"""Plots as SVG, made by hand: lines over logarithmic axes, a heat map, stacked bars.

Every colour and size is written into the shapes, so that a plot looks alike wherever it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2f6f4f", "#b3382c", "#2b5c9e", "#b8860b", "#6b4a8b", "#3c8d93", "#8a5a44")
WIDTH, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 760, 64, 40, 660, 300
_GRID, _PALE = "#dde2dd", (246, 248, 246)


@dataclass(frozen=True, slots=True)
class Line:
    """A named row of points ``(x, y)``, all above 0; dashed for what is no measured forward."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def lines(title: str, x_label: str, y_label: str, given: Sequence[Line]) -> str:
    """Lines over two logarithmic axes; empty ones are left out."""
    shown = [line for line in given if line.points]
    xs = sorted({x for line in shown for x, _ in line.points})
    ys = [y for line in shown for _, y in line.points]
    if not xs:
        return _page(title, [])
    x_at = _log_axis(xs[0], xs[-1], LEFT, LEFT + PLOT_WIDTH)
    low, high = _nice_below(min(ys)), _nice_above(max(ys))
    y_at = _log_axis(low, high, TOP + PLOT_HEIGHT, TOP)
    parts = []
    for value in _ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y_at(value):.1f} h{PLOT_WIDTH}" stroke="{_GRID}"/>')
        parts.append(_text(LEFT - 8, y_at(value) + 4, f"{value:g}", "end"))
    last = -math.inf
    for x in xs:
        if x_at(x) - last >= 34:  # labels would overlap
            parts.append(_text(x_at(x), TOP + PLOT_HEIGHT + 18, f"{x:g}"))
            last = x_at(x)
    parts.append(_text(LEFT + PLOT_WIDTH / 2, TOP + PLOT_HEIGHT + 36, f"{x_label}; {y_label}"))
    for line, colour in zip(shown, _colours(), strict=False):
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        at = [(x_at(x), y_at(y)) for x, y in sorted(line.points)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        if not line.dashed:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
    names = [(line.name, colour) for line, colour in zip(shown, _colours(), strict=False)]
    return _page(title, parts, names)


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    x_label: str,
    y_label: str,
) -> str:
    """A cell for each value, darker above 1 by the logarithm; None is an empty cell."""
    largest = max((v for row in rows.values() for v in row if v is not None), default=1.0)
    width, height = PLOT_WIDTH / max(1, len(columns)), min(48.0, PLOT_HEIGHT / max(1, len(rows)))
    parts = [_text(LEFT - 8, TOP - 6, y_label, "end")]
    for at, (name, values) in enumerate(rows.items()):
        y = TOP + at * height
        parts.append(_text(LEFT - 8, y + height / 2 + 4, name, "end"))
        for column, value in enumerate(values):
            if value is None:
                continue
            share = max(0.0, math.log(value)) / max(math.log(largest), 1e-9) if value > 0 else 0.0
            box = f'x="{LEFT + column * width:.1f}" y="{y:.1f}" width="{width:.1f}"'
            parts.append(f'<rect {box} height="{height:.1f}" fill="{_shade(share)}"/>')
            ink = "#fff" if share > 0.6 else "#222"
            place = (LEFT + (column + 0.5) * width, y + height / 2 + 4)
            parts.append(_text(*place, f"{value:.2f}×", fill=ink))
    bottom = TOP + len(rows) * height
    for column, name in enumerate(columns):
        parts.append(_text(LEFT + (column + 0.5) * width, bottom + 18, name))
    parts.append(_text(LEFT + PLOT_WIDTH / 2, bottom + 36, x_label))
    return _page(title, parts, height=int(bottom) + 50)


def bars(title: str, x_label: str, y_label: str, given: Mapping[str, Mapping[str, float]]) -> str:
    """Stacked bars, each scaled to the whole of its parts, whose sum stands above it."""
    kinds = list(dict.fromkeys(kind for parts in given.values() for kind in parts))
    colour = dict(zip(kinds, _colours(), strict=False))
    width, bottom = PLOT_WIDTH / max(1, len(given)), TOP + PLOT_HEIGHT
    parts = []
    for at, (name, values) in enumerate(given.items()):
        whole, y = sum(values.values()), float(bottom)
        left = LEFT + (at + 0.15) * width
        for kind, value in values.items():
            height = (PLOT_HEIGHT - 20) * value / max(whole, 1e-12)
            y -= height
            box = f'x="{left:.1f}" y="{y:.1f}" width="{0.7 * width:.1f}" height="{height:.1f}"'
            parts.append(f'<rect {box} fill="{colour[kind]}"/>')
            if height > 14:
                share = f"{100 * value / whole:.0f} %"
                parts.append(_text(left + 0.35 * width, y + height / 2 + 4, share, fill="#fff"))
        parts.append(_text(left + 0.35 * width, y - 5, f"{whole:.3g}"))
        parts.append(_text(left + 0.35 * width, bottom + 18, name))
    parts.append(_text(LEFT + PLOT_WIDTH / 2, bottom + 36, f"{x_label}; {y_label}"))
    return _page(title, parts, list(colour.items()))


def _page(
    title: str,
    parts: Sequence[str],
    names: Sequence[tuple[str, str]] = (),
    height: int = TOP + PLOT_HEIGHT + 50,
) -> str:
    """The whole picture: a title above, and below the names with their colours."""
    legend, x, y = [], LEFT, height + 6
    for name, colour in names:
        wide = 34 + 7 * len(name)
        if x + wide > WIDTH:
            x, y = LEFT, y + 20
        legend.append(f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{colour}"/>')
        legend.append(_text(x + 20, y, name, "start"))
        x += wide
    total = y + 14 if names else height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" font-size="12" '
        f'font-family="Helvetica, Arial, sans-serif"><rect width="{WIDTH}" height="{total}" '
        f'fill="#fff"/><text x="{LEFT}" y="22" font-size="14" font-weight="bold">'
        f"{escape(title)}</text>"
    )
    return "\n".join([head, *parts, *legend, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str = "middle", fill: str = "#222") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place}>{escape(text)}</text>"


def _log_axis(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low) or 1.0
    return lambda value: begin + (end - begin) * math.log(value / low) / span


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times each power of ten from ``low`` to ``high``."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def _nice_below(value: float) -> float:
    return max(t for t in _ticks(value / 10, value * 10) if t <= value * 1.001)


def _nice_above(value: float) -> float:
    return min(t for t in _ticks(value / 10, value * 10) if t >= value * 0.999)


def _shade(share: float) -> str:
    dark = (47, 111, 79)
    mixed = (round(a + (b - a) * min(share, 1.0)) for a, b in zip(_PALE, dark, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _colours() -> tuple[str, ...]:
    return COLOURS * 3
