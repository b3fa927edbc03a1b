"""Sentences that say what bounds a replay and what would change that.

A sentence is given only where its figure is worth acting on; each names its figure, and the flag
where there is one.
"""

from __future__ import annotations

from breakgraph.inspection.figures import clean_name, milliseconds, op_rows, percent, size
from breakgraph.inspection.gather import Inspection

IDLE_SHARE = 0.1
"""Of a replay, idle device time from which on the host is called the bound."""
NOISE = 0.05
"""A difference between graph and eager that may be the clock's."""
PADDING_SHARE = 0.06
"""Of a bucket's rows; the derived ladder pads by 12.5 % at most, 6 % in the middle."""


def advise(seen: Inspection) -> list[str]:
    """What to know and what to do, the most telling first."""
    found = [_speed(seen), _bound(seen), _breaks(seen), _padding(seen), _kernels(seen)]
    return [sentence for sentence in [*found, _memory(seen)] if sentence]


def break_us(seen: Inspection, *names: str) -> float:
    """Host microseconds of the breaks of those names, or of all."""
    return sum(
        step.host_us
        for step in seen.replay.steps
        if step.kind == "break" and (not names or step.name in names)
    )


def break_share(seen: Inspection, *names: str) -> float:
    """Of the replay's length, what the host spends in the breaks of those names, or in all."""
    return break_us(seen, *names) / max(seen.replay.end_us, 1e-9)


def idle_share(seen: Inspection) -> float:
    """Of the replay, how much the device has nothing to do, from its first op to its last."""
    spans = [span for step in seen.replay.steps for span in seen.replay.spans(step)]
    if not spans:
        return 0.0
    whole = max(span.end_us for span in spans) - min(span.start_us for span in spans)
    return 1 - seen.replay.busy_us / max(whole, 1e-9)


def _speed(seen: Inspection) -> str:
    eager, replay = seen.eager.wall_us, seen.replay.wall_us
    ratio = eager / max(replay, 1e-9)
    times = f"{milliseconds(replay)} by graph, {milliseconds(eager)} eagerly"
    if ratio >= 1 + NOISE:
        return f"The graph is {ratio:.2f}× as fast as the eager forward: {times}."
    if ratio > 1 - NOISE:
        return f"The graph is as fast as the eager forward: {times}."
    return (
        f"The graph takes {1 / ratio:.2f}× as long as the eager forward: {times}. "
        "--prefill-dispatch measured runs such a batch eagerly."
    )


def _bound(seen: Inspection) -> str:
    if seen.on_cpu:
        return ""
    idle = idle_share(seen)
    if idle < IDLE_SHARE:
        return (
            f"The device is busy {percent(1 - idle)} of the replay: its kernels are the bound, and "
            "only faster or fewer of them would help."
        )
    return (
        f"The device idles {percent(idle)} of the replay, waiting for the host: more tokens in a "
        "forward, or fewer and cheaper breaks, would fill it."
    )


def _breaks(seen: Inspection) -> str:
    count = sum(step.kind == "break" for step in seen.steps)
    if not count:
        return "There is no break: the whole stack is one segment."
    shares = [(name, percent(break_share(seen, name))) for name in seen.break_names]
    each = ": " + ", ".join(f"{name} {share}" for name, share in shares) if len(shares) > 1 else ""
    many = "1 break takes" if count == 1 else f"{count} breaks take"
    share = percent(break_share(seen))
    if seen.on_cpu:
        return f"{many} {share} of the replay{each}."
    text = f"{many} {milliseconds(break_us(seen))} of the host, {share} of the replay{each}"
    if idle_share(seen) < IDLE_SHARE:
        return f"{text}; the kernels before them hide it."
    if break_share(seen, *seen.recurrent_breaks) > 0.1 and seen.recurrent_breaks:
        return (
            f"{text}. --linear-attention-capture {len(seen.lengths)} would take the recurrent ones "
            "into the segments."
        )
    return f"{text}."


def _padding(seen: Inspection) -> str:
    share = seen.padding / seen.bucket
    if not seen.padding:
        return f"No row is padding: the batch fills its bucket of {seen.bucket}."
    text = f"{seen.padding} of {seen.bucket} rows are padding, {percent(share)}."
    if share > PADDING_SHARE:
        text += f" If batches of {seen.num_tokens} tokens are common, give them a bucket of their "
        text += "own with --piecewise-cuda-graph-tokens."
    return text


def _kernels(seen: Inspection) -> str:
    rows = [row for row in op_rows(seen.replay) if "break" not in row.where or not seen.on_cpu]
    if not rows:
        return ""
    top, of = rows[0], "the segments" if seen.on_cpu else "all kernels"
    whole = sum(row.us for row in rows)
    return f"{clean_name(top.name, 60)} takes {percent(top.us / max(whole, 1e-9))} of {of}."


def _memory(seen: Inspection) -> str:
    if not seen.asked_bytes:
        return ""
    if not seen.pool_bytes:
        return f"The segments asked for {size(seen.asked_bytes)}, all in memory the pool had."
    times = seen.asked_bytes / seen.pool_bytes
    return (
        f"The pool grew to {size(seen.pool_bytes)} for {size(seen.asked_bytes)} asked of it: each "
        f"byte serves {times:.1f} times."
    )
