"""An inspection as one static page: no script, no link, nothing to fetch.

It is well-formed XML as well as HTML, and readable on light and on dark, as the reader's system
asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from breakgraph import __version__
from breakgraph.inspection.advice import advise, break_share, idle_share
from breakgraph.inspection.figures import (
    CATEGORIES,
    category,
    clean_name,
    milliseconds,
    op_rows,
    percent,
    size,
    step_rows,
)
from breakgraph.inspection.gather import Inspection
from breakgraph.inspection.picture import (
    break_bars,
    break_style,
    category_style,
    pool_bars,
    rows_picture,
    timelines,
    zoom,
)

_MOST_OPS = 12

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2229; --soft: #5b6570;
 --track: #e9ecef; --rule: #d5dade; --seg: #2f6f4f; --b0: #f2b134; --b1: #d8623c; --b2: #9c6bc4;
 --b3: #3f8fb5; --c0: #2f6f4f; --c1: #c79a2b; --c2: #58a27c; --c3: #8cc4a5; --c4: #b9c0c7;
 --asked: #a9d2bb; --grown: #2f6f4f; --r0: #4b7bb5; --r1: #7aa3d1; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e4e8ec; --soft: #9aa5b1;
 --track: #262d35; --rule: #39424c; --seg: #3c8a63; --c0: #3c8a63; --c2: #2f9e86; --c3: #7cbf9d;
 --c4: #77828d; --asked: #406b57; --grown: #7ad9a8; } }
body { margin: 0 auto; padding: 20px 24px 28px; max-width: 1160px; background: var(--page);
 color: var(--ink); font: 14px/1.45 Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 21px; margin: 0; } h2 { font-size: 15px; margin: 24px 0 4px; }
p { margin: 3px 0; } .soft { color: var(--soft); font-size: 12.5px; }
ul { margin: 10px 0 0; padding-left: 20px; } li { margin: 2px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px; margin: 14px 0 6px; }
.tiles div { border: 1px solid var(--rule); border-radius: 6px; padding: 5px 10px; }
.tiles b { display: block; font-size: 16px; } .tiles span { color: var(--soft); font-size: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; color: var(--soft);
 margin: 2px 0 4px; }
.legend svg { width: 11px; height: 11px; margin-right: 5px; vertical-align: -1px; }
.pair { display: flex; flex-wrap: wrap; gap: 24px; } .pair h2 { margin-top: 20px; }
svg { display: block; max-width: 100%; height: auto; } .legend svg { display: inline; }
svg text { font-size: 11px; fill: var(--ink); } svg .small, svg .name { fill: var(--soft); }
svg .total { font-size: 12px; font-weight: bold; } svg .tick { stroke: var(--rule); }
.track { fill: var(--track); } .seg { fill: var(--seg); } .b0 { fill: var(--b0); }
.b1 { fill: var(--b1); } .b2 { fill: var(--b2); } .b3 { fill: var(--b3); } .c0 { fill: var(--c0); }
.c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); } .c4 { fill: var(--c4); }
.asked { fill: var(--asked); } .grown { fill: var(--grown); } .r0 { fill: var(--r0); }
.r1 { fill: var(--r1); } .pad { fill: var(--track); stroke: var(--soft); stroke-dasharray: 3 3; }
svg .on-seg, svg .on-c0, svg .on-b1, svg .on-b2, svg .on-b3, svg .on-r0 { fill: #ffffff; }
svg .on-b0, svg .on-c1, svg .on-c2, svg .on-c3, svg .on-c4, svg .on-r1 { fill: #14181d; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; margin-top: 4px; }
th { text-align: left; font-weight: normal; color: var(--soft); }
th, td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.w { white-space: normal; width: 45%; overflow-wrap: anywhere; } details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); }
"""


def page(seen: Inspection) -> str:
    """The whole HTML document."""
    what = f"{seen.num_tokens} tokens in a bucket of {seen.bucket}"
    title = f"Prefill of {what}: {seen.model}"
    zoomed, shown = zoom(seen)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_subtitle(seen))}</p>',
        _tiles(seen),
        "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in advise(seen)) + "</ul>",
        "<h2>Eager and replay, on one time axis</h2>",
        _legend(_step_legend(seen)),
        timelines(seen),
        f"<h2>The first {milliseconds(shown)} of the replay</h2>",
        _legend(_op_legend(seen)),
        zoomed,
        "<h2>Rows of the bucket</h2>",
        rows_picture(seen),
        _bar_charts(seen),
        "<h2>Steps, those that hold the same as one row</h2>",
        _step_table(seen),
        "<h2>" + ("Ops" if seen.on_cpu else "Kernels") + " of the replay, by time</h2>",
        _op_table(seen),
        _every_step(seen),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def how_timed(seen: Inspection) -> str:
    """Where the times come from, in a sentence."""
    if seen.on_cpu:
        return (
            f"Wall time of each op on the CPU tape, its fastest of {seen.repeats} replays, laid "
            "end to end; on a CPU host and device are one, and a break is timed as a whole."
        )
    return (
        f"Kernels timed by CUPTI in one profiled run, which slows the host a little; totals are "
        f"medians of {seen.repeats} runs without it."
    )


def _subtitle(seen: Inspection) -> str:
    requests = len(seen.lengths)
    return (
        f"{seen.architecture}, {requests} request{'' if requests == 1 else 's'}; {seen.machine}; "
        f"breakgraph {__version__}. {how_timed(seen)}"
    )


def _tiles(seen: Inspection) -> str:
    speed = seen.eager.wall_us / max(seen.replay.wall_us, 1e-9)
    segments = sum(step.kind == "segment" for step in seen.steps)
    tiles = [
        (milliseconds(seen.replay.wall_us), "stack, replayed"),
        (milliseconds(seen.eager.wall_us), "stack, eager"),
        (f"{speed:.2f}×", "as fast as eager"),
        (" / ".join(milliseconds(us) for us in seen.forward_us), "whole forward, graph / eager"),
        (f"{segments} + {len(seen.steps) - segments}", "segments + breaks"),
        (percent(break_share(seen)), "of replay in breaks" if seen.on_cpu else "host in breaks"),
        (percent(seen.padding / seen.bucket), "of the rows padding"),
        (size(seen.pool_bytes), "new in the pool"),
    ]
    if not seen.on_cpu:
        tiles.insert(6, (percent(idle_share(seen)), "GPU idle"))
    inside = "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in tiles)
    return f'<div class="tiles">{inside}</div>'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    swatch = '<svg viewBox="0 0 11 11"><rect class="{}" width="11" height="11"/></svg>'
    inside = "".join(
        f"<span>{swatch.format(escape(style))}{escape(text)}</span>" for style, text in entries
    )
    return f'<div class="legend">{inside}</div>'


def _step_legend(seen: Inspection) -> list[tuple[str, str]]:
    segment = "segment; between the breaks, in eager" if seen.on_cpu else "segment, or eager stack"
    entries = [("seg", segment)]
    entries += [(break_style(seen, name), f"break {name}") for name in seen.break_names]
    if not seen.on_cpu:
        entries.append(("track", "nothing to do"))
    return [*entries, *_op_legend(seen)] if seen.on_cpu else entries


def _op_legend(seen: Inspection) -> list[tuple[str, str]]:
    segments = [step for step in seen.replay.steps if step.kind == "segment"]
    met = {category(op.name) for step in segments for op in step.ops}
    return [
        (category_style(example), kind)
        for kind, example in zip(CATEGORIES, ("mm", "scan", "norm", "add", "copy"), strict=True)
        if kind in met
    ]


def _bar_charts(seen: Inspection) -> str:
    charts = []
    if seen.break_names:
        names = [(break_style(seen, name), name) for name in seen.break_names]
        heading = "Host time of each break"
        charts.append(f"<div><h2>{heading}</h2>{_legend(names)}{break_bars(seen)}</div>")
    if seen.asked_bytes:
        names = [("asked", "asked of the pool"), ("grown", "new memory for it")]
        heading = "Pool bytes by segment"
        charts.append(f"<div><h2>{heading}</h2>{_legend(names)}{pool_bars(seen)}</div>")
    return f'<div class="pair">{"".join(charts)}</div>' if charts else ""


def _step_table(seen: Inspection) -> str:
    side = [] if seen.on_cpu else ["host each"]
    head = ["step", "count", *side, "each", "in all", "share", "nodes", "pool each", "ops"]
    rows = []
    for row in step_rows(seen):
        own = [] if seen.on_cpu else [milliseconds(row.host_us)]
        rows.append(
            [
                row.label,
                f"×{row.count}",
                *own,
                milliseconds(row.device_us),
                milliseconds(row.total_us),
                percent(row.share),
                str(row.nodes) if row.nodes else "",
                size(row.asked_bytes) if row.kind == "segment" else "",
                row.ops,
            ]
        )
    return _table(head, rows, texts=(0, len(head) - 1))


def _op_table(seen: Inspection) -> str:
    rows = op_rows(seen.replay)
    told = [
        [
            clean_name(row.name, 80),
            f"×{row.count}",
            milliseconds(row.us),
            percent(row.share),
            milliseconds(row.us / row.count),
            row.where,
        ]
        for row in rows[:_MOST_OPS]
    ]
    rest = rows[_MOST_OPS:]
    if rest:
        us, count = sum(row.us for row in rest), sum(row.count for row in rest)
        share = percent(sum(row.share for row in rest))
        told.append([f"{len(rest)} more", f"×{count}", milliseconds(us), share, "", ""])
    head = ["op" if seen.on_cpu else "kernel", "count", "in all", "share", "each", "in"]
    return _table(head, told, texts=(0, 5))


def _every_step(seen: Inspection) -> str:
    head = ["step", "kind", "begins at", "host", "device", "nodes", "asked of the pool", "new"]
    rows = [
        [
            info.name,
            info.kind,
            milliseconds(step.host_start_us),
            milliseconds(step.host_us),
            milliseconds(seen.replay.device_us(step)),
            str(info.nodes),
            size(info.asked_bytes),
            size(info.grown_bytes),
        ]
        for info, step in zip(seen.steps, seen.replay.steps, strict=True)
    ]
    table = _table(head, rows, texts=(0, 1))
    return f"<details><summary>Every step</summary>{table}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int]) -> str:
    """A table whose columns are figures, but for ``texts``; the last of those may wrap."""

    def row(cells: Sequence[str], tag: str) -> str:
        inside = ""
        for at, cell in enumerate(cells):
            style = "n" if at not in texts else "w" if at == len(cells) - 1 > 5 else ""
            inside += f'<{tag} class="{style}">{escape(cell)}</{tag}>'
        return f"<tr>{inside}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"
