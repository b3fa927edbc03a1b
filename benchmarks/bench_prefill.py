"""Prefill, eager against graphs: host token ids in, last-token logits on the device.

All modes run the same model code on the same buffers, batch preparation included, turn by turn,
so that drift meets all alike. "captured" is breakable with --linear-attention-capture. With
``--mode auto`` there are full graphs too, and "auto" is what dispatch makes of all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.common import (
    machine,
    median,
    model_runner,
    prefill_request,
    shape_names,
    timed,
    write_json,
)
from breakgraph.forward import ForwardBatch
from breakgraph.runner import ModelRunner

GRAPHS = ("breakable", "captured", "full")
TOKENS = (16, 32, 64, 100, 128, 256, 300, 512, 769, 1024, 1025, 2048, 3000, 4096)


def measure(runner: ModelRunner, num_tokens: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """One row: medians in milliseconds of ``repeats`` prefills a mode."""
    request = prefill_request(runner.vocab_size, num_tokens, batch_size)

    def prefill(mode: str) -> Any:
        batch = ForwardBatch.from_requests(*request)
        with served_by(runner, mode):
            return runner.forward(batch, allow_graph=mode != "eager")

    modes = modes_for(runner, ForwardBatch.from_requests(*request))
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for repeat in range(repeats + 3):
        start = repeat % len(modes)  # none is always the one that meets the hottest chip
        for mode in modes[start:] + modes[:start]:
            taken = timed(lambda mode=mode: prefill(mode))
            if repeat >= 3:
                times[mode].append(taken)
    row: dict[str, Any] = {"tokens": num_tokens, "batch_size": batch_size}
    for mode in modes:
        row[f"{mode}_ms"] = median([wall for wall, _ in times[mode]])
        row[f"{mode}_event_ms"] = median([event for _, event in times[mode]])
        if mode != "eager":
            row[f"{mode}_bucket"] = prefill(mode).dispatch.bucket
    if "auto" in modes:
        dispatch = prefill("auto").dispatch
        row["auto_takes"] = "eager" if dispatch.bucket is None else dispatch.kind
        single = [row[f"{mode}_ms"] for mode in modes if mode != "auto"]
        row["auto_over_best"] = row["auto_ms"] / min(single)
    row["speedup"] = row["eager_ms"] / row[f"{modes[-1]}_ms"]
    return row


def modes_for(runner: ModelRunner, batch: ForwardBatch) -> list[str]:
    """Eager, the kinds of graphs that can hold ``batch``, and "auto" where dispatch chooses."""
    graphs = runner.prefill_graph_runners[::-1]
    kinds = [each.kind for each in graphs if each.refuses(batch) is None]
    chooses = runner.args.cuda_graph_backend_prefill == "auto"
    return ["eager", *kinds, *(["auto"] if chooses else [])]


@contextmanager
def served_by(runner: ModelRunner, mode: str) -> Iterator[None]:
    """By the graphs of one kind alone, unless ``mode`` is "auto".

    Beside "auto" they serve whatever fits a bucket; without it they do as in a server.
    """
    names = ("graph_runner", "linear_graph_runner", "full_graph_runner")
    graphs = {name: getattr(runner, name) for name in names}
    known = {name: each.costs for name, each in graphs.items() if each is not None}
    chooses = runner.args.cuda_graph_backend_prefill == "auto"
    for name, each in graphs.items():
        if each is not None and mode != "auto":
            setattr(runner, name, each if each.kind == mode else None)
            each.costs = None if chooses else each.costs
    try:
        yield
    finally:
        for name, each in graphs.items():
            setattr(runner, name, each)
            if each is not None:
                each.costs = known[name]


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    text = f"{row['tokens']:6d} {row['batch_size']:3d} {row['eager_ms']:10.3f}"
    for mode in GRAPHS:
        ms, bucket = row.get(f"{mode}_ms"), row.get(f"{mode}_bucket")
        cell = "-" if ms is None else f"{ms:.3f} ({bucket or 'eager'})"
        text += f" {cell:>17}"
    text += f" {row['speedup']:8.2f}x"
    if "auto_ms" in row:
        taken = f"{row['auto_ms']:.3f} {row['auto_takes']}"
        text += f" {taken:>19} {row['auto_over_best']:.3f}x"
    return text


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
    parser.add_argument("--mode", choices=("breakable", "full", "auto"), default="breakable")
    parser.add_argument("--prefill-graph-requests", type=int, default=8, metavar="R")
    parser.add_argument("--matrix-products", choices=("auto", "cublas"), default="auto")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    flags = {
        "cuda_graph_backend_prefill": args.mode,
        "prefill_graph_requests": args.prefill_graph_requests,
        "chunked_prefill_size": max(args.tokens),
        "matrix_products": args.matrix_products,
        "linear_attention_capture": args.linear_attention_capture,
    }
    with model_runner(args.shape, max_total_tokens=max(args.tokens), **flags) as runner:
        graphs = runner.prefill_graph_runners
        if not graphs:
            raise SystemExit("the model offers no layer stack, so there is nothing to compare")
        seconds = [round(one.capture_seconds, 2) for one in graphs]
        print(f"{args.shape} on {machine()}: captured in {seconds} s")
        heads = " ".join(f"{f'{kind} (bucket)':>17}" for kind in GRAPHS)
        print(f"tokens  bs   eager ms {heads}  speed-up        auto ms, its way  of the best")
        rows = []
        for tokens in args.tokens:
            for batch_size in (size for size in args.batch_sizes if size <= tokens):
                rows.append(measure(runner, tokens, batch_size, args.repeats))
                print(shown(rows[-1]), flush=True)
    write_json(args.output, {"shape": args.shape, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
