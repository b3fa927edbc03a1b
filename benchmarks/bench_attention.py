"""What attention of one layer costs the GPU and the host: FlashAttention-2 against FlashInfer's 3.

Slots are scattered over the cache, as after many requests. A call's GPU time is that of one among
``CALLS`` in a CUDA graph; plans and breaks are timed on the host, with no wait for the GPU between
them. ``static`` is FlashInfer's with its plan at fixed addresses, as full graphs hold it, and
``tiled`` what they hold for few rows.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.common import gpu_us, host_us, machine, write_json
from breakgraph.attention import (
    Attention,
    AttentionBackend,
    FlashInferBackend,
    TiledBackend,
    TorchFlashBackend,
)
from breakgraph.forward import ForwardBatch

SLOTS, REQUESTS, TOKENS = 90_000, 64, 16_384
CASES = (
    *((1, new, 0) for new in (16, 128, 512, 1024, 2048, 4096, 8192)),
    *((8, new, 0) for new in (16, 64, 128, 256, 512, 1024)),
    *((1, 512, 4096), (1, 16, 8000), (8, 64, 1024), (64, 1, 1024)),
)
"""Requests, new tokens of each, and cached ones."""


def scattered(requests: int, new: int, cached: int) -> ForwardBatch:
    """Requests of one length, their tokens in slots drawn at random."""
    drawn = np.random.default_rng(0).permutation(SLOTS - 1)[: requests * (new + cached)] + 1
    slots = drawn.reshape(requests, new + cached)
    ids = [[0] * new] * requests
    return ForwardBatch.from_requests(ids, [s[cached:] for s in slots], [s[:cached] for s in slots])


def measure(
    layer: Attention, backends: dict[str, AttentionBackend], case: tuple[int, int, int]
) -> dict[str, float]:
    """One row: microseconds by backend."""
    requests, new, cached = case
    batch, row = scattered(*case), {"requests": requests, "new": new, "cached": cached}
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    rows = (batch.num_tokens, sum(heads), layer.head_dim)
    q, k, v = torch.randn(rows, dtype=torch.bfloat16, device="cuda").split(heads, 1)
    out, slots = torch.zeros_like(q), torch.from_numpy(batch.out_cache_loc).cuda()
    layer.k_cache[slots], layer.v_cache[slots] = k, v
    for name, backend in backends.items():
        backend.init_forward_metadata(batch, len(q))
        row[f"{name}_gpu_us"] = gpu_us(lambda b=backend: b.forward(layer, q, k, v, out))
        row[f"{name}_break_us"] = host_us(lambda b=backend: b.forward(layer, q, k, v, out), 50)
        row[f"{name}_plan_us"] = host_us(lambda b=backend: b.init_forward_metadata(batch), 20)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    layer = Attention(num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=args.head_dim)
    cache, dtype = (SLOTS, args.kv_heads, args.head_dim), torch.bfloat16
    layer.k_cache, layer.v_cache = torch.randn(2, *cache, dtype=dtype, device="cuda")
    place = {"device": torch.device("cuda"), "max_requests": REQUESTS}
    backends: dict[str, AttentionBackend] = {
        "fa2": TorchFlashBackend(**place, max_context_tokens=TOKENS),
        "fa3": FlashInferBackend(layer, dtype, **place, max_context_tokens=TOKENS),
        "static": FlashInferBackend(
            layer, dtype, **place, max_context_tokens=SLOTS, max_new_tokens=8192, static=True
        ),
        "tiled": TiledBackend(
            layer, **place, max_context_tokens=SLOTS, max_new_tokens=max(r * n for r, n, _ in CASES)
        ),
    }
    print(f"{args.heads} heads of {args.head_dim}, {args.kv_heads} of keys, on {machine()}")
    print("requests  new  cached  " + "  ".join(f"{name}: gpu break plan" for name in backends))
    rows = []
    with torch.no_grad():
        for case in CASES:
            rows.append(measure(layer, backends, case))
            times = "  ".join(f"{us:7.1f}" for us in list(rows[-1].values())[3:])
            print(f"{case[0]:8d} {case[1]:5d} {case[2]:6d}  {times}", flush=True)
    heads = {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim}
    write_json(args.output, heads | {"rows": rows})


if __name__ == "__main__":
    main()
