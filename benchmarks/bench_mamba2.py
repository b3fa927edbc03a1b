"""What a Mamba2 mixer's convolution and recurrence cost the GPU and the host, beside fla's."""

from __future__ import annotations

import argparse
import importlib.util

import torch
import torch.nn.functional as F

from benchmarks.common import gpu_us, host_us, machine, write_json
from breakgraph.kernels.causal_conv import causal_conv, causal_conv_step
from breakgraph.kernels.mamba2 import mamba2_scan, mamba2_step

HEADS, HEAD_DIM, GROUPS, STATE_DIM, WIDTH = 128, 64, 8, 128, 4  # of NemotronH-8B
INNER, MIXED = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE_DIM
LIMITS = (0.001, float("inf"))
BANDWIDTH = 4.3e12
"""Bytes per second of a copy on an H200, read and written."""


class Layer:
    """Random parameters, and the states of ``slots`` requests."""

    def __init__(self, slots: int) -> None:
        new = {"dtype": torch.bfloat16, "device": "cuda"}
        self.weight, self.bias = torch.randn(MIXED, WIDTH, **new), torch.randn(MIXED, **new)
        self.conv_state = torch.randn(slots, WIDTH - 1, MIXED, **new)
        self.state = torch.randn(slots, HEADS, HEAD_DIM, STATE_DIM, device="cuda")
        self.a_log = torch.arange(1, HEADS + 1, device="cuda").float().log()
        self.d = torch.ones(HEADS, device="cuda")
        self.dt_bias = torch.randn(HEADS, device="cuda") - 3

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
        return self.a_log, self.d, self.dt_bias, *LIMITS


def split(mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, b, c = mixed.split([INNER, GROUPS * STATE_DIM, GROUPS * STATE_DIM], 1)
    return (
        x.unflatten(1, (HEADS, HEAD_DIM)),
        b.unflatten(1, (GROUPS, STATE_DIM)),
        c.unflatten(1, (GROUPS, STATE_DIM)),
    )


def prefill_row(tokens: int, chunk_size: int) -> dict[str, float]:
    """One request of ``tokens`` from zeros."""
    layer, new = Layer(2), {"dtype": torch.int32, "device": "cuda"}
    projected = torch.randn(tokens, INNER + MIXED + HEADS, dtype=torch.bfloat16, device="cuda")
    mixed, dt = projected[:, INNER : INNER + MIXED], projected[:, INNER + MIXED :]
    convolved = torch.empty(tokens, MIXED, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    chunks = -(-tokens // chunk_size)
    bounds, offsets = torch.tensor([0, tokens], **new), torch.tensor([0, chunks], **new)
    initial, final = torch.tensor([-1], **new), torch.tensor([1], **new)
    cut = torch.stack([torch.zeros(chunks, **new), torch.arange(chunks, **new)], 1)

    def conv() -> None:
        causal_conv(
            *(mixed, layer.weight, layer.bias, layer.conv_state, bounds, initial, final),
            *(cut, chunk_size, convolved),
        )

    def scan() -> None:
        mamba2_scan(
            *(*split(convolved), dt, *layer.parameters(), layer.state, bounds, initial, final),
            *(cut, offsets, chunk_size, out),
        )

    conv()
    found = {"tokens": float(tokens)}
    for name, call in (("conv", conv), ("scan", scan)):
        found |= {f"{name}_gpu_us": gpu_us(call), f"{name}_host_us": host_us(call)}
    return found | fla_row(mixed.contiguous(), dt, layer, bounds.long())


def fla_row(
    mixed: torch.Tensor, dt: torch.Tensor, layer: Layer, bounds: torch.Tensor
) -> dict[str, float]:
    """The same by fla where it is installed; B and C, which it wants for each head, are timed too.

    The scan is timed on the GPU without ``cu_seqlens``, with which it cannot be captured.
    """
    if importlib.util.find_spec("fla") is None:
        return {}
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.simple_gla import chunk_simple_gla

    x, b, c = split(mixed)
    steps = F.softplus(dt.float() + layer.dt_bias).clamp(*LIMITS)
    values, decay = (x * steps[..., None]).bfloat16()[None], -layer.a_log.exp() * steps
    keys, queries = (t.repeat_interleave(HEADS // GROUPS, 1)[None] for t in (b, c))

    def conv(**how: torch.Tensor) -> None:
        causal_conv1d(mixed[None], layer.weight, layer.bias, activation="silu", **how)

    def scan(**how: torch.Tensor) -> None:
        chunk_simple_gla(
            *(queries, keys, values, decay[None]), scale=1.0, output_final_state=True, **how
        )

    with torch.no_grad():
        return {
            "fla_conv_gpu_us": gpu_us(conv),
            "fla_conv_host_us": host_us(lambda: conv(cu_seqlens=bounds), 50),
            "fla_scan_gpu_us": gpu_us(scan),
            "fla_scan_host_us": host_us(lambda: scan(cu_seqlens=bounds), 50),
            "fla_repeat_gpu_us": 2 * gpu_us(lambda: b.repeat_interleave(HEADS // GROUPS, 1)),
        }


def step_row(rows: int) -> dict[str, float]:
    """One token of each of ``rows`` requests."""
    layer, slots = Layer(rows + 1), torch.arange(1, rows + 1, device="cuda")
    projected = torch.randn(rows, INNER + MIXED + HEADS, dtype=torch.bfloat16, device="cuda")
    mixed, dt = projected[:, INNER : INNER + MIXED], projected[:, INNER + MIXED :]
    convolved = torch.empty(rows, MIXED, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    def conv() -> None:
        causal_conv_step(mixed, layer.weight, layer.bias, layer.conv_state, slots, convolved)

    def recur() -> None:
        mamba2_step(*split(convolved), dt, *layer.parameters(), layer.state, slots, out)

    conv()
    return {
        "rows": float(rows),
        "conv_gpu_us": gpu_us(conv),
        "step_gpu_us": gpu_us(recur),
        "step_bytes_us": 2 * layer.state[1:].nbytes / BANDWIDTH * 1e6,
    }


def show(rows: list[dict[str, float]]) -> None:
    print(" ".join(f"{name.removesuffix('_us'):>14}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value:14.1f}" for value in row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    prefill = [prefill_row(tokens, args.chunk_size) for tokens in (16, 128, 512, 2048, 4096)]
    steps = [step_row(rows) for rows in (1, 8, 32, 64)]
    print(f"microseconds a layer, on {machine()}")
    show(prefill)
    show(steps)
    write_json(args.output, {"chunk_size": args.chunk_size, "prefill": prefill, "step": steps})


if __name__ == "__main__":
    main()
