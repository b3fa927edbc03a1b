"""What capturing a ladder costs: seconds, and graph memory against the largest bucket alone."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.common import machine, model_runner, shape_names, write_json
from breakgraph.runner import GraphRunner


def time_buckets() -> list[float]:
    """A list that will hold the milliseconds of each bucket captured from now on."""
    times: list[float] = []
    plain = GraphRunner._capture_bucket

    def timed(graphs: GraphRunner, bucket: int) -> Any:
        start = time.perf_counter()
        graph = plain(graphs, bucket)
        times.append((time.perf_counter() - start) * 1e3)
        return graph

    GraphRunner._capture_bucket = timed  # type: ignore
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-8b")
    parser.add_argument("--chunked-prefill-size", type=int, default=8192)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    chunk = args.chunked_prefill_size
    found, times = {}, time_buckets()
    for name, buckets in (("largest", (chunk,)), ("ladder", None)):
        with model_runner(
            args.shape,
            enable_breakable_cuda_graph=True,
            piecewise_cuda_graph_tokens=buckets,
            chunked_prefill_size=chunk,
            max_total_tokens=chunk,
        ) as runner:
            graphs = runner.graph_runner
            if graphs is None:
                raise SystemExit("the model offers no layer stack, so there is nothing to capture")
            found[name] = {
                "buckets": len(graphs.buckets),
                "seconds": graphs.capture_seconds,
                "gigabytes": graphs.memory_bytes / 1e9,
                "segments": graphs.graphs[chunk].num_segments,
                "median_bucket_ms": statistics.median(times),
            }
            del graphs
            times.clear()
        row = found[name]
        print(
            f"{args.shape} {name}: {row['buckets']} buckets to {chunk}, {row['segments']} segments "
            f"each: {row['seconds']:.2f} s, {row['median_bucket_ms']:.1f} ms a bucket (median), "
            f"{row['gigabytes']:.3f} GB"
        )
    ratio = found["ladder"]["gigabytes"] / found["largest"]["gigabytes"]
    print(f"ladder over largest bucket: {ratio:.3f}x the memory, on {machine()}")
    write_json(args.output, {"shape": args.shape, "memory_ratio": ratio} | found)


if __name__ == "__main__":
    main()
