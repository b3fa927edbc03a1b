"""What a decode costs: the attention kernel against its bytes, and a step eager against graph."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.common import machine, median, model_runner, shape_names, timed, write_json
from breakgraph.forward import ForwardBatch, ForwardMode
from breakgraph.kernels import decode_attention
from breakgraph.runner import ModelRunner

BANDWIDTH = 4.3e12
"""Bytes per second of a copy on an H200, read and written."""

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 36, 32, 8, 128  # of Qwen3-8B


def kernel_row(batch_size: int, context: int) -> dict[str, float]:
    """Microseconds of one layer's attention in a graph of all layers, each with its own cache."""
    slots = batch_size * context + 1
    shape = (LAYERS, 2, slots, KV_HEADS, HEAD_DIM)
    caches = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(batch_size, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    order = torch.randperm(slots - 1, device="cuda").to(torch.int32) + 1
    table = order.view(batch_size, context)
    rows = torch.arange(batch_size, device="cuda")
    lengths = torch.full_like(rows, context)
    out = torch.empty_like(q)

    def layers() -> None:
        for k, v in caches:
            decode_attention(q, k, v, table, rows, lengths, HEAD_DIM**-0.5, out)

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    graph.replay()
    took = median([timed(graph.replay)[1] for _ in range(20)]) * 1e3 / LAYERS
    floor = 2 * batch_size * context * KV_HEADS * HEAD_DIM * 2 / BANDWIDTH * 1e6
    return {"batch_size": batch_size, "context": context, "us": took, "bytes_floor_us": floor}


def step_row(runner: ModelRunner, batch_size: int, context: int) -> dict[str, float]:
    """Milliseconds of a decode of requests of ``context`` tokens, by wall clock to the logits."""
    table = runner.requests
    rows = [table.acquire() for _ in range(batch_size)]
    prefixes = [table.extend(row, context).copy() for row in rows]
    batch = ForwardBatch.from_requests(
        [[1]] * batch_size,
        [table.extend(row, 1) for row in rows],
        prefixes,
        mode=ForwardMode.DECODE,
        rows=np.asarray(rows, np.int64),
    )
    found: dict[str, float] = {"batch_size": batch_size, "context": context}
    for name, allow_graph in (("eager_ms", False), ("graph_ms", True)):
        times = [
            timed(lambda graph=allow_graph: runner.forward(batch, allow_graph=graph))[0]
            for _ in range(15)
        ]
        found[name] = median(times[5:])
    for row in rows:
        table.release(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-0.6b")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    kernels = [kernel_row(size, args.context) for size in (1, 8, 64)]
    for row in kernels:
        print(
            f"attention of {row['batch_size']} requests of {args.context} tokens: "
            f"{row['us']:.1f} µs a layer, {row['bytes_floor_us']:.1f} by bytes"
        )
    torch.cuda.empty_cache()
    with model_runner(
        args.shape, max_total_tokens=40 * args.context, disable_cuda_graph=False
    ) as runner:
        graphs = runner.decode_graph_runner
        if graphs is None:
            raise SystemExit("decode graphs are disabled, so there is nothing to compare")
        capture = {"seconds": graphs.capture_seconds, "gigabytes": graphs.memory_bytes / 1e9}
        steps = [step_row(runner, size, args.context) for size in (1, 8, 32)]
        del graphs
    for row in steps:
        print(
            f"{args.shape} decode of {row['batch_size']} requests: {row['eager_ms']:.2f} ms eager, "
            f"{row['graph_ms']:.2f} ms by graph"
        )
    print(f"capture: {capture['seconds']:.2f} s, {capture['gigabytes']:.3f} GB, on {machine()}")
    result = {"shape": args.shape, "kernel": kernels, "step": steps, "capture": capture}
    write_json(args.output, result)


if __name__ == "__main__":
    main()
