"""Tables and plots of a suite's JSON files: ``python -m benchmarks.report FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import Line, bars, heat_map, lines

Found = dict[str, Any]

REST = "rest"


def write_report(folder: Path) -> None:
    """Write ``report.md`` and the plots beside the JSON files in ``folder``."""
    every = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    every = [found for found in every if "shape" in found and "captures" in found]
    if not every:
        return
    machine = ", ".join(f"{key} {value}" for key, value in every[0]["machine"].items())
    text = [f"# Prefill on one machine\n\n{machine}.\n", LEGEND]
    for found in every:
        text += _section(found, folder)
    for key, unit in (("seconds", "seconds"), ("gigabytes", "GB")):
        plotted = [Line(found["shape"], _ladders(found, key)) for found in every]
        plot = lines(f"Capture of a ladder, {unit}", "buckets", unit, plotted)
        (folder / f"capture_{key}.svg").write_text(plot)
        text.append(f"![capture, {unit}](capture_{key}.svg)\n")
    (folder / "report.md").write_text("\n".join(text))


LEGEND = """Milliseconds of whole prefills, host token ids in, last-token logits on the device,
medians. *products*: all matrix products of the model in one CUDA graph. *with mixers*: those and
attention in one graph, or the kernels of a hybrid's mixers as the profiler times them. *of the
floor*: a whole prefill over that second floor, timed turn by turn with it. A bucket in brackets is
what was replayed: so many tokens are none, or their graph was found not to pay and dropped; a mode
without a time had none left that serves.
"""


def _section(found: Found, folder: Path) -> list[str]:
    name = found["shape"]
    rows: list[Found] = found["rows"]
    text = [f"## {name}\n"]
    if "error" in found:
        text.append(f"Cut short by an error: {found['error']}\n")
    if rows:
        text += [_rows_table(found), ""]
        (folder / f"{name}_latency.svg").write_text(_latency(found))
        (folder / f"{name}_speedup.svg").write_text(_speedups(found))
        text += [f"![latency]({name}_latency.svg)\n", f"![speed-up]({name}_speedup.svg)\n"]
    if found["left_out"]:
        left = ", ".join(f"{at['tokens']}×{at['batch_size']}" for at in found["left_out"])
        text.append(f"No time for tokens × requests: {left}.\n")
    if found["kernels"]:
        (folder / f"{name}_kernels.svg").write_text(_kernels(found))
        text.append(f"![kernels]({name}_kernels.svg)\n")
    if found["peers"]:
        text += [_peers_table(found), ""]
    text += [f"- {line}" for line in found.get("engines", ())]
    text += ["", _captures_table(found), ""]
    return text


def modes_of(row: Found) -> list[str]:
    """The modes that a row of ``bench_prefill`` has a time of; not those that ran eagerly, because
    their graphs were found not to pay."""
    named = [
        key.removesuffix("_ms")
        for key in row
        if key.endswith("_ms") and not key.endswith("_event_ms")
    ]
    return [mode for mode in named if mode in ("eager", "auto") or row[f"{mode}_bucket"]]


def _padded(row: Found, mode: str) -> bool:
    """Whether a larger bucket was replayed, because that of so many tokens did not pay."""
    return mode != "auto" and row.get(f"{mode}_bucket", row["tokens"]) != row["tokens"]


def _cell(row: Found, mode: str) -> str:
    if mode not in modes_of(row):
        return ""
    bucket = f" ({row[f'{mode}_bucket']})" if _padded(row, mode) else ""
    return _ms(row[f"{mode}_ms"]) + bucket


def best_ms(row: Found) -> float:
    """Of the modes that are not eager."""
    return min(float(row[f"{mode}_ms"]) for mode in modes_of(row) if mode != "eager")


def _every_mode(rows: Iterable[Found]) -> list[str]:
    return list(dict.fromkeys(mode for row in rows for mode in modes_of(row)))


def _rows_table(found: Found) -> str:
    modes = _every_mode(found["rows"])
    floors = {floor["tokens"]: floor for floor in found["floors"]}
    head = ["tokens", "requests", *modes, "speed-up", "products", "with mixers", "of the floor"]
    table = []
    for row in sorted(found["rows"], key=lambda row: (row["batch_size"], row["tokens"])):
        floor = floors.get(row["tokens"], {}) if row["batch_size"] == 1 else {}
        both = floor.get("products_and_mixer_ms")
        table.append(
            [
                str(row["tokens"]),
                str(row["batch_size"]),
                *(_cell(row, mode) for mode in modes),
                f"{row['eager_ms'] / best_ms(row):.2f}×",
                _ms(floor.get("products_ms")),
                _ms(both),
                f"{floor.get('prefill_ms', best_ms(row)) / both:.2f}×" if both else "",
            ]
        )
    return markdown_table(head, table)


def _peers_table(found: Found) -> str:
    ours = {row["tokens"]: best_ms(row) for row in found["rows"] if row["batch_size"] == 1}
    table = []
    for peer in found["peers"]:
        best, ms = ours.get(peer["tokens"]), peer.get("ms")
        table.append(
            [
                f"{peer['peer']}, {peer['mode']}",
                str(peer["tokens"]),
                _ms(ms) or str(peer.get("error", "")),
                _ms(best),
                f"{ms / best:.2f}×" if ms and best else "",
                f"{peer['compile_seconds']:.0f}" if "compile_seconds" in peer else "",
            ]
        )
    head = ["peer", "tokens", "ms", "best here, ms", "ratio", "seconds to compile"]
    return markdown_table(head, table)


def _captures_table(found: Found) -> str:
    table = [
        [
            one["kind"],
            str(one["buckets"]),
            str(one["segments"]),
            f"{one['seconds']:.2f}",
            f"{1e3 * one['seconds'] / one['buckets']:.1f}",
            f"{one['gigabytes']:.3f}",
        ]
        for one in [*found["captures"], *found["ladders"]]
    ]
    head = ["capture", "buckets", "segments", "seconds", "ms a bucket", "GB"]
    return markdown_table(head, table)


def _latency(found: Found) -> str:
    rows = [row for row in found["rows"] if row["batch_size"] == 1]
    plotted = [
        Line(
            mode,
            [
                (row["tokens"], row[f"{mode}_ms"])
                for row in rows
                if mode in modes_of(row) and not _padded(row, mode)
            ],
        )
        for mode in _every_mode(rows)
    ]
    for key, name in (
        ("products_ms", "matrix products alone"),
        ("products_and_mixer_ms", "products and mixers"),
    ):
        points = [(floor["tokens"], floor[key]) for floor in found["floors"] if floor.get(key)]
        plotted.append(Line(name, points, dashed=True))
    for mode in dict.fromkeys(peer["mode"] for peer in found["peers"]):
        of_mode = [peer for peer in found["peers"] if peer["mode"] == mode and "ms" in peer]
        plotted.append(Line(f"transformers, {mode}", [(p["tokens"], p["ms"]) for p in of_mode]))
    return lines(f"{found['shape']}, one request", "tokens", "milliseconds a prefill", plotted)


def _speedups(found: Found) -> str:
    rows = {(row["batch_size"], row["tokens"]): row for row in found["rows"]}
    counts = sorted({tokens for _, tokens in rows})
    cells = {}
    for batch_size in sorted({size for size, _ in rows}):
        of_size = [rows.get((batch_size, tokens)) for tokens in counts]
        cells[str(batch_size)] = [row and row["eager_ms"] / best_ms(row) for row in of_size]
    title = f"{found['shape']}, eager over the best mode with graphs"
    return heat_map(title, [str(count) for count in counts], cells, "tokens", "requests")


def _kernels(found: Found) -> str:
    """Kernels by class, and what is left of the prefill as it is timed without a profiler.

    That is gaps, the host, and the lower clocks of prefills that follow each other.
    """
    rows = {row["tokens"]: row for row in found["rows"] if row["batch_size"] == 1}
    given = {}
    for one in found["kernels"]:
        tokens, classes = one["tokens"], dict(one["classes_ms"])
        idle = best_ms(rows[tokens]) - sum(classes.values()) if tokens in rows else 0.0
        given[str(tokens)] = classes | ({REST: idle} if idle > 0 else {})
    title = f"{found['shape']}, where one request's prefill goes"
    return bars(title, "tokens", "milliseconds above each bar", given)


def _ladders(found: Found, key: str) -> list[tuple[float, float]]:
    return sorted((one["buckets"], one[key]) for one in found["ladders"] if one[key] > 0)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as Markdown."""
    every = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
