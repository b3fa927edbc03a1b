"""What a break costs: host and device time of each step of a replay, by kind."""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.common import machine, median, model_runner, shape_names, write_json
from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.graph.inspect import describe, format_table, time_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=(16, 128, 512))
    parser.add_argument("--repeats", type=int, default=50, help="timed replays")
    parser.add_argument("--steps", action="store_true", help="print every step, with its kernels")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    rows = []
    with model_runner(
        args.shape,
        enable_breakable_cuda_graph=True,
        piecewise_cuda_graph_tokens=tuple(args.tokens),
        chunked_prefill_size=max(args.tokens),
        max_total_tokens=max(args.tokens),
        prefill_dispatch="always",
    ) as runner:
        graphs = runner.graph_runner
        if graphs is None:
            raise SystemExit("the model offers no layer stack, so there is nothing to time")
        print(f"{args.shape} on {machine()}")
        print("tokens  breaks  host µs a break  device µs a break  host µs a segment launch")
        for tokens in args.tokens:
            ids = np.random.default_rng(tokens).integers(0, runner.vocab_size, tokens)
            batch = ForwardBatch.from_requests([ids.tolist()], [np.arange(1, tokens + 1)])
            graph = graphs.graphs[tokens]
            graphs.replay_prepare(batch, tokens)
            with forward_context(batch, runner.attn_backend):
                timings = time_steps(graph, args.repeats)
            breaks = [timing for timing in timings if timing.kind == "break"]
            segments = [timing for timing in timings if timing.kind == "segment"]
            row = {
                "tokens": tokens,
                "breaks": len(breaks),
                "break_host_us": median([timing.host_us for timing in breaks]),
                "break_device_us": median([timing.device_us for timing in breaks]),
                "segment_host_us": median([timing.host_us for timing in segments]),
            }
            rows.append(row)
            print(
                f"{tokens:6d} {len(breaks):7d} {row['break_host_us']:16.1f} "
                f"{row['break_device_us']:18.1f} {row['segment_host_us']:25.1f}"
            )
            if args.steps:
                print(format_table(describe(graph), timings))
    write_json(args.output, {"shape": args.shape, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
