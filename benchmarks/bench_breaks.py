"""What breaks cost: host and device time of each kind, and how long the GPU idles for them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, median, model_runner, shape_names, write_json
from breakgraph.forward import ForwardBatch, forward_context
from breakgraph.graph.inspect import describe, format_table, time_steps
from breakgraph.runner import ModelRunner


def measure(runner: ModelRunner, tokens: int, repeats: int, steps: bool) -> list[dict[str, Any]]:
    """A row for each kind of break of the graph of ``tokens``."""
    ids = np.random.default_rng(tokens).integers(0, runner.vocab_size, tokens)
    batch = ForwardBatch.from_requests([ids.tolist()], [np.arange(1, tokens + 1)])
    graphs = runner.linear_graph_runner or runner.graph_runner
    if graphs is None:
        raise SystemExit("the model offers no layer stack, so there is nothing to time")
    graph = graphs.graphs[tokens]
    graphs.replay_prepare(batch, tokens)
    with forward_context(batch, graphs.attn_backend):
        timings = time_steps(graph, repeats)
        wall, busy = replay_times(graph.replay)
    if steps:
        print(format_table(describe(graph), timings))
    launches = [timing.host_us for timing in timings if timing.kind == "segment"]
    rows = []
    for name in sorted({timing.name for timing in timings if timing.kind == "break"}):
        of_kind = [timing for timing in timings if timing.name == name]
        rows.append(
            {
                "tokens": tokens,
                "break": name,
                "count": len(of_kind),
                "host_us": median([timing.host_us for timing in of_kind]),
                "device_us": median([timing.device_us for timing in of_kind]),
                "segment_launch_us": median(launches),
                "replay_us": wall,
                "idle_us_a_break": (wall - busy) / graph.num_breaks,
            }
        )
    return rows


def replay_times(replay: Callable[[], None]) -> tuple[float, float]:
    """Microseconds from the first kernel's begin to the last one's end, and those with one busy."""
    if not torch.cuda.is_available():
        return 0.0, 0.0
    activity = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return 0.0, 0.0
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return end - spans[0][0], busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=(16, 128, 512))
    parser.add_argument("--repeats", type=int, default=50, help="timed replays")
    parser.add_argument("--steps", action="store_true", help="print every step, with its kernels")
    parser.add_argument("--linear-attention-capture", type=int, default=0, metavar="R")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    flags = {
        "enable_breakable_cuda_graph": True,
        "piecewise_cuda_graph_tokens": tuple(args.tokens),
        "chunked_prefill_size": max(args.tokens),
        "max_total_tokens": max(args.tokens),
        "prefill_dispatch": "always",
        "linear_attention_capture": args.linear_attention_capture,
    }
    rows = []
    with model_runner(args.shape, **flags) as runner:
        print(f"{args.shape} on {machine()}")
        print(
            "tokens  breaks  host µs  device µs  µs a segment launch  idle µs a break  "
            "replay ms  kind"
        )
        for tokens in args.tokens:
            for row in measure(runner, tokens, args.repeats, args.steps):
                rows.append(row)
                print(
                    f"{tokens:6d} {row['count']:7d} {row['host_us']:8.1f} {row['device_us']:10.1f} "
                    f"{row['segment_launch_us']:20.1f} {row['idle_us_a_break']:16.1f} "
                    f"{row['replay_us'] / 1e3:10.3f}  {row['break']}"
                )
    write_json(args.output, {"shape": args.shape, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
