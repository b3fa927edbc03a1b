"""The pictures of an inspection: timelines to scale, what breaks cost, where memory goes.

Colour says what a stretch is: a segment, one of the kinds of breaks or, in the lane of ops, the
kind of work. A bare track is time in which the device has nothing to do.
"""

from __future__ import annotations

from breakgraph.graph import StepTrace, Trace
from breakgraph.inspection.drawing import GUTTER, WIDTH, Block, Canvas, Scale, ticks
from breakgraph.inspection.figures import (
    CATEGORIES,
    category,
    clean_name,
    milliseconds,
    op_spans,
    percent,
    size,
)
from breakgraph.inspection.gather import Inspection

_LANE, _GAP = 26, 6
_BREAK_STYLES = 4
_FEWEST_STEPS, _MOST_STEPS, _MOST_OPS = 3, 9, 48
"""What the closer look takes in; a segment may hold many layers."""


def timelines(seen: Inspection) -> str:
    """Eager and replay, one over the other on one time axis."""
    last = max(seen.eager.end_us, seen.replay.end_us) / 1e3
    scale, canvas = Scale(last, right=WIDTH - 74), Canvas("Eager and replayed forward")
    y = 2.0
    for name, trace in (("eager", seen.eager), ("replay", seen.replay)):
        top = y
        for lane, blocks in _lanes(seen, name, trace):
            canvas.lane(y, _LANE, lane, blocks, scale, trace.end_us / 1e3)
            y += _LANE + _GAP
        middle = (top + y - _GAP) / 2 + 4
        canvas.text(scale.x(trace.end_us / 1e3) + 6, middle, milliseconds(trace.end_us), "total")
        y += 8
    canvas.axis(y - 4, scale, "ms")
    return canvas.svg()


def zoom(seen: Inspection) -> tuple[str, float]:
    """The begin of the replay with the names of its ops, and how many microseconds that is."""
    last = _first_layers_us(seen)
    unit, per = ("ms", 1e3) if last >= 2e3 else ("µs", 1.0)
    scale, canvas = Scale(last / per), Canvas("The begin of the replay")
    steps = seen.replay.steps
    y = 2.0
    canvas.lane(y, _LANE, "steps", _outlines(seen, per, steps), scale)
    y += _LANE + _GAP
    canvas.lane(y, _LANE, "ops", _op_blocks(seen, seen.replay, per, steps), scale)
    y += _LANE + _GAP
    if not seen.on_cpu:
        canvas.lane(y, _LANE, "host", _host_blocks(seen, per, steps), scale)
        y += _LANE + _GAP
    canvas.axis(y, scale, unit)
    return canvas.svg(), last


def rows_picture(seen: Inspection) -> str:
    """The bucket's rows: whose each is, and the padding."""
    scale, canvas = Scale(seen.bucket), Canvas("Rows of the bucket")
    blocks, start = [], 0
    for at, length in enumerate(seen.lengths):
        title = f"request {at}: {length} tokens"
        label = title if len(seen.lengths) < 6 else str(length)
        blocks.append(Block(start, start + length, f"r{at % 2}", label, title))
        start += length
    if seen.padding:
        share = percent(seen.padding / seen.bucket)
        title = f"padding: {seen.padding} rows, {share}"
        blocks.append(Block(start, seen.bucket, "pad", f"{seen.padding} padding", title))
    canvas.lane(2, _LANE, "rows", blocks, scale)
    canvas.axis(_LANE + 4, scale, "")
    return canvas.svg()


def break_bars(seen: Inspection, width: float = WIDTH / 2 - 12) -> str:
    """The host time of each break, in replay order."""
    found = [step for step in seen.replay.steps if step.kind == "break"]
    bars = [[(step.host_us, break_style(seen, step.name))] for step in found]
    titles = [f"{step.name}: {milliseconds(step.host_us)} of the host" for step in found]
    return _bars("Host time of each break", bars, titles, "µs", 1.0, "break", width)


def pool_bars(seen: Inspection, width: float = WIDTH / 2 - 12) -> str:
    """What each segment asked of the pool, and by how much the pool grew."""
    found = [step for step in seen.steps if step.kind == "segment"]
    largest = max((step.asked_bytes for step in found), default=0)
    unit, per = ("MB", 1e6) if largest >= 1e6 else ("kB", 1e3)
    bars = [
        [(float(step.asked_bytes), "asked"), (float(step.grown_bytes), "grown")] for step in found
    ]
    titles = [
        f"{step.name}: {size(step.asked_bytes)} asked for, {size(step.grown_bytes)} new"
        for step in found
    ]
    return _bars("Pool bytes by segment", bars, titles, unit, per, "segment", width)


def break_style(seen: Inspection, name: str) -> str:
    """The class that colours breaks of that name."""
    names = seen.break_names
    return f"b{names.index(name) % _BREAK_STYLES}" if name in names else "seg"


def category_style(name: str) -> str:
    """The class that colours an op of a segment."""
    return f"c{CATEGORIES.index(category(name))}"


def _lanes(seen: Inspection, name: str, trace: Trace) -> list[tuple[str, list[Block]]]:
    if not trace.on_cpu:
        return [
            (f"{name}: GPU", _step_blocks(seen, trace, 1e3, trace.steps)),
            ("host", _host_blocks(seen, 1e3, trace.steps, trace)),
        ]
    lanes = [(name, _step_blocks(seen, trace, 1e3, trace.steps))]
    if any(step.ops for step in trace.steps):
        lanes.append(("ops", _op_blocks(seen, trace, 1e3, trace.steps)))
    return lanes


def _step_blocks(
    seen: Inspection, trace: Trace, per: float, steps: tuple[StepTrace, ...]
) -> list[Block]:
    """When the device worked for each step, in units of ``per`` microseconds."""
    blocks = []
    for step in steps:
        style = "seg" if step.kind == "segment" else break_style(seen, step.name)
        for span in trace.spans(step):
            what = step.name if trace.on_cpu else f"{step.name}: {clean_name(span.name, 90)}"
            label = step.name if trace.on_cpu else ""
            title = f"{what}, {milliseconds(span.us)}"
            blocks.append(Block(span.start_us / per, span.end_us / per, style, label, title))
    return blocks


def _outlines(seen: Inspection, per: float, steps: tuple[StepTrace, ...]) -> list[Block]:
    """Each step from the begin of its first op to the end of its last."""
    blocks = []
    for step in steps:
        spans = seen.replay.spans(step)
        if spans:
            style = "seg" if step.kind == "segment" else break_style(seen, step.name)
            start, end = min(s.start_us for s in spans), max(s.end_us for s in spans)
            title = f"{step.name}, {milliseconds(end - start)}"
            blocks.append(Block(start / per, end / per, style, step.name, title))
    return blocks


def _op_blocks(
    seen: Inspection, trace: Trace, per: float, steps: tuple[StepTrace, ...]
) -> list[Block]:
    blocks = []
    for step in steps:
        for span in op_spans(trace, step):
            own = step.kind == "break"
            style = break_style(seen, step.name) if own else category_style(span.name)
            title = f"{clean_name(span.name, 90)}, {milliseconds(span.us)}, in {step.name}"
            label = "" if own and trace.on_cpu else clean_name(span.name, 24)
            blocks.append(Block(span.start_us / per, span.end_us / per, style, label, title))
    return blocks


def _host_blocks(
    seen: Inspection, per: float, steps: tuple[StepTrace, ...], trace: Trace | None = None
) -> list[Block]:
    blocks = []
    for step in steps:
        style = "seg" if step.kind == "segment" else break_style(seen, step.name)
        verb = "launch of " if step.kind == "segment" and trace is not seen.eager else ""
        title = f"{verb}{step.name}, {milliseconds(step.host_us)} of the host"
        blocks.append(
            Block(step.host_start_us / per, step.host_end_us / per, style, step.name, title)
        )
    return blocks


def _first_layers_us(seen: Inspection) -> float:
    """What to look at closely: a layer, or until each kind of break has been met."""
    firsts = {step.name: at for at, step in reversed(list(enumerate(seen.steps)))}
    last = max((firsts[name] for name in seen.break_names), default=0)
    steps = seen.replay.steps[: max(_FEWEST_STEPS, min(_MOST_STEPS, last + 2))]
    ends = [op.end_us for step in steps for op in op_spans(seen.replay, step)][:_MOST_OPS]
    return max(ends, default=0.0)


def _bars(
    label: str,
    bars: list[list[tuple[float, str]]],
    titles: list[str],
    unit: str,
    per: float,
    what: str,
    width: float,
) -> str:
    """Groups of bars from a common base; values are in units of ``per`` of the unit named."""
    canvas, left, top, base = Canvas(label, width), 56.0, 14.0, 134.0
    largest = max((value / per for group in bars for value, _ in group), default=0.0) or 1.0
    marks = ticks(largest * 1.05, 4)
    for value in marks:
        y = base - (base - top) * value / (largest * 1.05)
        canvas.line(left, y, width - 4, y, "tick")
        canvas.text(left - 6, y + 4, f"{value:g}", "small", "end")
    canvas.text(4, top - 2, unit, "small")
    slot = (width - 8 - left) / max(len(bars), 1)
    for at, (group, title) in enumerate(zip(bars, titles, strict=True)):
        wide = min(slot * 0.8, 34.0) / len(group)
        x = left + slot * (at + 0.5) - wide * len(group) / 2
        for value, style in group:
            height = (base - top) * value / per / (largest * 1.05)
            if value:
                canvas.rect(x, base - height, wide - min(0.5, wide / 4), height, style, title)
            x += wide
    every = max(1, -(-len(bars) // 16))
    for at in range(0, len(bars), every):
        canvas.text(left + slot * (at + 0.5), base + 15, str(at), "small", "middle")
    canvas.text(left - 6, base + 15, what, "small", "end")
    return canvas.svg()


__all__ = [
    "GUTTER",
    "break_bars",
    "break_style",
    "category_style",
    "pool_bars",
    "rows_picture",
    "timelines",
    "zoom",
]
