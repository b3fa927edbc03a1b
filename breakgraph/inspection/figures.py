"""Traces as rows of figures.

Steps that hold the same are one row, and so are ops of one name; here too is how figures are
written, so that a page, a picture and a terminal say the same.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from breakgraph.graph import OpSpan, StepInfo, StepTrace, Trace
from breakgraph.inspection.gather import Inspection

CATEGORIES = ("matrix product", "mixer", "norm", "pointwise", "copy")
_PATTERNS = (
    ("mixer", r"flash|fmha|attention|attend|softmax|sdpa|scan|conv|delta_rule|chunk|mamba"),
    (
        "matrix product",
        r"gemm|gemv|mm\b|mm_|matmul|cutlass|cublas|nvjet|linear|splitk|product|routed_(up|down)",
    ),
    ("norm", r"norm"),
    ("copy", r"copy|clone|memcpy|memset|index|scatter|gather|store|fill|zero|cat\b|sort"),
)


@dataclass(kw_only=True, frozen=True, slots=True)
class StepRow:
    """Steps of one kind that hold the same."""

    label: str
    kind: str
    count: int
    host_us: float
    """Median of one step."""
    device_us: float
    """Median of one step."""
    total_us: float
    """Of all of them on the device."""
    share: float
    """Of the replay's device time."""
    nodes: int
    asked_bytes: int
    """Of one step."""
    ops: str


@dataclass(frozen=True, slots=True)
class OpRow:
    """Ops of one name."""

    name: str
    count: int
    us: float
    """Of all of them."""
    share: float
    """Of all ops."""
    where: str
    """``segments``, ``breaks`` or both."""


def step_rows(seen: Inspection) -> list[StepRow]:
    """One row for all steps that are alike, in order of the first of them."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for at, info in enumerate(seen.steps):
        key = (info.name,) if info.kind == "break" else ("", *sorted(info.op_names))
        alike.setdefault(key, []).append(at)
    whole = sum(seen.replay.device_us(step) for step in seen.replay.steps)
    return [_step_row(seen, members, whole) for members in alike.values()]


def _step_row(seen: Inspection, members: Sequence[int], whole: float) -> StepRow:
    infos = [seen.steps[at] for at in members]
    traces = [seen.replay.steps[at] for at in members]
    device = [seen.replay.device_us(trace) for trace in traces]
    return StepRow(
        label=infos[0].name if infos[0].kind == "break" else _numbers(infos),
        kind=infos[0].kind,
        count=len(members),
        host_us=statistics.median(trace.host_us for trace in traces),
        device_us=statistics.median(device),
        total_us=sum(device),
        share=sum(device) / max(whole, 1e-9),
        nodes=infos[0].nodes,
        asked_bytes=int(statistics.median(info.asked_bytes for info in infos)),
        ops=_most(infos[0].op_names or [op.name for op in traces[0].ops]),
    )


def _numbers(infos: Sequence[StepInfo]) -> str:
    """``segments 1–5, 7`` for segments of those numbers."""
    numbers = [int(info.name.split()[-1]) for info in infos]
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        ends = dict.fromkeys((members[0], members[-1]))
        parts.append("–".join(map(str, ends)))
    text = ", ".join(parts) if len(parts) <= 3 else ", ".join([*parts[:2], "…", parts[-1]])
    return f"segment{'' if len(infos) == 1 else 's'} {text}"


def _most(names: Sequence[str], shown: int = 4) -> str:
    counts = Counter(clean_name(name) for name in names).most_common()
    parts = [name + (f" ×{count}" if count > 1 else "") for name, count in counts[:shown]]
    return ", ".join(parts) + (f", {len(counts) - shown} more" if len(counts) > shown else "")


def op_rows(trace: Trace) -> list[OpRow]:
    """Ops by name, the most time first; a break whose ops are not known is one op."""
    times: dict[str, list[tuple[float, str]]] = {}
    for step in trace.steps:
        for span in op_spans(trace, step):
            times.setdefault(span.name, []).append((span.us, step.kind))
    whole = sum(us for found in times.values() for us, _ in found)
    rows = [
        OpRow(
            name,
            len(found),
            sum(us for us, _ in found),
            sum(us for us, _ in found) / max(whole, 1e-9),
            " and ".join(f"{kind}s" for kind in sorted({kind for _, kind in found}, reverse=True)),
        )
        for name, found in times.items()
    ]
    return sorted(rows, key=lambda row: -row.us)


def op_spans(trace: Trace, step: StepTrace) -> Sequence[OpSpan]:
    """What ran for a step; the step as a whole where nothing finer is known."""
    return step.ops or trace.spans(step)


def category(name: str) -> str:
    """What kind of work an op of that name does; ``pointwise`` where nothing else is known."""
    lowered = name.lower()
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, lowered)), "pointwise")


def clean_name(name: str, width: int = 40) -> str:
    """A kernel's or op's name without what every such name has, cut to ``width``."""
    name = re.sub(r"^(void |aten\.|breakgraph\.)", "", name)
    name = re.sub(r"\.(default|Tensor|Scalar|out)$", "", name)
    bare = name.replace("(anonymous namespace)::", "").replace("at::native::", "")
    bare = re.split(r"[<(]", bare, maxsplit=1)[0] or bare
    if "<" in name and re.search(r"elementwise|reduce", bare):  # the functor is what tells
        functor = re.search(r"(\w*[Ff]unctor\w*|\w+_kernel_cuda)", name)
        bare += f"<{functor[1]}>" if functor else ""
    return bare if len(bare) <= width else bare[: width - 1] + "…"


def milliseconds(us: float) -> str:
    """``21.8 ms``, or ``640 µs`` below one millisecond."""
    if us < 1000:
        return f"{us:.0f} µs" if us >= 10 else f"{us:.1f} µs"
    return f"{us / 1e3:.1f} ms" if us < 1e5 else f"{us / 1e3:.0f} ms"


def percent(share: float) -> str:
    """``15 %``; one decimal below ten."""
    if share == 0:
        return "0 %"
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def size(num_bytes: float) -> str:
    """``1.5 MB``; decimal units."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"
