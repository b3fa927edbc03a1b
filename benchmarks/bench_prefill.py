"""Prefill, eager against graphs: host token ids in, last-token logits on the device.

All modes run the same model code on the same buffers, batch preparation included, turn by turn,
so that drift meets all alike. "captured" is breakable with --linear-attention-capture.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.common import machine, median, model_runner, shape_names, timed, write_json
from breakgraph.forward import ForwardBatch
from breakgraph.runner import ModelRunner

TOKENS = (16, 32, 64, 100, 128, 256, 300, 512, 769, 1024, 1025, 2048, 3000, 4096)


def measure(runner: ModelRunner, num_tokens: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """One row: medians in milliseconds of ``repeats`` prefills a mode."""
    random = np.random.default_rng(num_tokens)
    lengths = [len(part) for part in np.array_split(np.arange(num_tokens), batch_size)]
    ids = [random.integers(0, runner.vocab_size, length).tolist() for length in lengths]
    ends = np.cumsum(lengths)
    slots = [np.arange(end - n + 1, end + 1) for end, n in zip(ends, lengths, strict=True)]

    def prefill(mode: str) -> Any:
        batch = ForwardBatch.from_requests(ids, slots)
        with served_by(runner, mode):
            return runner.forward(batch, allow_graph=mode != "eager")

    modes = ["eager", "breakable"]
    if (
        runner.linear_graph_runner is not None
        and batch_size <= runner.args.linear_attention_capture
    ):
        modes.append("captured")
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for repeat in range(repeats + 3):
        for mode in modes:
            taken = timed(lambda mode=mode: prefill(mode))
            if repeat >= 3:
                times[mode].append(taken)
    row: dict[str, Any] = {"tokens": num_tokens, "batch_size": batch_size}
    for mode in modes:
        row[f"{mode}_ms"] = median([wall for wall, _ in times[mode]])
        row[f"{mode}_event_ms"] = median([event for _, event in times[mode]])
        if mode != "eager":
            row[f"{mode}_bucket"] = prefill(mode).dispatch.bucket
    row["speedup"] = row["eager_ms"] / row[f"{modes[-1]}_ms"]
    return row


@contextmanager
def served_by(runner: ModelRunner, mode: str) -> Iterator[None]:
    """Without the graphs that hold the recurrent mixers, unless ``mode`` is "captured"."""
    graphs = runner.linear_graph_runner
    if mode != "captured":
        runner.linear_graph_runner = None
    try:
        yield
    finally:
        runner.linear_graph_runner = graphs


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    text = f"{row['tokens']:6d} {row['batch_size']:3d} {row['eager_ms']:10.3f}"
    for mode in ("breakable", "captured"):
        ms, bucket = row.get(f"{mode}_ms"), row.get(f"{mode}_bucket")
        cell = "-" if ms is None else f"{ms:.3f} ({bucket or 'eager'})"
        text += f" {cell:>17}"
    return f"{text} {row['speedup']:8.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 4, 8))
    parser.add_argument("--repeats", type=int, default=20, help="timed prefills a mode")
    parser.add_argument(
        "--linear-attention-capture",
        type=int,
        default=0,
        metavar="R",
        help="also time graphs that hold a hybrid's recurrent mixers, for up to R requests",
    )
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    flags = {
        "enable_breakable_cuda_graph": True,
        "chunked_prefill_size": max(args.tokens),
        "linear_attention_capture": args.linear_attention_capture,
    }
    with model_runner(args.shape, max_total_tokens=max(args.tokens), **flags) as runner:
        graphs = [g for g in (runner.graph_runner, runner.linear_graph_runner) if g is not None]
        if not graphs:
            raise SystemExit("the model offers no layer stack, so there is nothing to compare")
        seconds = [round(one.capture_seconds, 2) for one in graphs]
        print(f"{args.shape} on {machine()}: captured in {seconds} s")
        print("tokens  bs   eager ms  breakable (bucket) captured (bucket)  speed-up")
        rows = []
        for tokens in args.tokens:
            for batch_size in args.batch_sizes:
                rows.append(measure(runner, tokens, batch_size, args.repeats))
                print(shown(rows[-1]), flush=True)
    write_json(args.output, {"shape": args.shape, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
