"""What the benchmarks share: shapes by name, timing, and what machine it was."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import SHAPES, model_folder, shape_names
from breakgraph.models import PrefillModel
from breakgraph.runner import ModelRunner
from breakgraph.server_args import ServerArgs

__all__ = [
    "SHAPES",
    "gpu_us",
    "host_us",
    "machine",
    "median",
    "model_folder",
    "model_runner",
    "prefill_request",
    "shape_names",
    "timed",
    "write_json",
]

CALLS = 10
"""Of what ``gpu_us`` times, in its graph."""


@contextmanager
def model_runner(
    shape: str, *, model: PrefillModel | None = None, **flags: Any
) -> Iterator[ModelRunner]:
    """A runner for the named shape: dummy weights, decode eager; its memory is freed at the end.

    With ``model`` it runs that, loaded already, over pools of its own.
    """
    with model_folder(shape) as folder:
        defaults = {"load_format": "dummy", "skip_tokenizer_init": True, "disable_cuda_graph": True}
        args = ServerArgs(model_path=folder, **(defaults | flags))
        runner = ModelRunner(args, model=model)
        yield runner
        del runner
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prefill_request(
    vocab_size: int, tokens: int, batch_size: int
) -> tuple[list[list[int]], list[np.ndarray]]:
    """``tokens`` random ids in ``batch_size`` requests of about the same length, and their slots:
    what ``ForwardBatch.from_requests`` takes."""
    random = np.random.default_rng(tokens)
    parts = np.array_split(np.arange(1, tokens + 1), batch_size)
    return [random.integers(0, vocab_size, len(part)).tolist() for part in parts], parts


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of one call by wall clock and by CUDA events, each ending with a sync."""
    cuda = torch.cuda.is_available()
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    began = time.perf_counter()
    call()
    if not cuda:
        wall = (time.perf_counter() - began) * 1e3
        return wall, wall
    end.record()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3, start.elapsed_time(end)


def gpu_us(call: Callable[[], object]) -> float:
    """Microseconds of one call, in a graph of ``CALLS``."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    return median([timed(graph.replay)[1] for _ in range(20)]) * 1e3 / CALLS


def host_us(call: Callable[[], object], calls: int = 200, runs: int = 5) -> float:
    """Microseconds that one call keeps the host, with no wait for the GPU between calls."""
    times = []
    for _ in range(runs):
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) * 1e6 / calls)
        torch.cuda.synchronize()
    return median(times)


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, str]:
    """Versions and device of this run."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    else:
        found["cpu"] = platform.processor() or platform.machine()
    return found


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": machine()} | result, indent=1) + "\n")
