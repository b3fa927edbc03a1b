"""Prefill, eager against breakable: host token ids in, last-token logits on the device.

Both modes run the same model code on the same buffers, batch preparation included, turn by
turn, so that drift meets both alike.
"""

from __future__ import annotations

import argparse
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

    def prefill(allow_graph: bool) -> Any:
        batch = ForwardBatch.from_requests(ids, slots)
        return runner.forward(batch, allow_graph=allow_graph)

    modes = {"eager": False, "breakable": True}
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for repeat in range(repeats + 3):
        for mode, allow_graph in modes.items():
            taken = timed(lambda allow=allow_graph: prefill(allow))
            if repeat >= 3:
                times[mode].append(taken)
    row: dict[str, Any] = {
        "tokens": num_tokens,
        "batch_size": batch_size,
        "bucket": prefill(True).dispatch.bucket,
    }
    for mode in modes:
        row[f"{mode}_ms"] = median([wall for wall, _ in times[mode]])
        row[f"{mode}_event_ms"] = median([event for _, event in times[mode]])
    row["speedup"] = row["eager_ms"] / row["breakable_ms"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 4, 8))
    parser.add_argument("--repeats", type=int, default=20, help="timed prefills a mode")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    flags = {"enable_breakable_cuda_graph": True, "chunked_prefill_size": max(args.tokens)}
    with model_runner(args.shape, max_total_tokens=max(args.tokens), **flags) as runner:
        graphs = runner.graph_runner
        if graphs is None:
            raise SystemExit("the model offers no layer stack, so there is nothing to compare")
        print(f"{args.shape} on {machine()}: capture {graphs.capture_seconds:.2f} s")
        print(
            "tokens  bs  bucket   eager ms  breakable ms  speed-up   (by events: eager, breakable)"
        )
        rows = []
        for tokens in args.tokens:
            for batch_size in args.batch_sizes:
                row = measure(runner, tokens, batch_size, args.repeats)
                rows.append(row)
                print(
                    f"{tokens:6d} {batch_size:3d} {row['bucket'] or 'eager':>7} "
                    f"{row['eager_ms']:10.3f} {row['breakable_ms']:13.3f} {row['speedup']:8.2f}x   "
                    f"({row['eager_event_ms']:.3f}, {row['breakable_event_ms']:.3f})",
                    flush=True,
                )
    write_json(args.output, {"shape": args.shape, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
