"""One shape of a suite: rows, floors, kernel classes, peers and captures, within a deadline.

``save`` is called after every figure, so whatever ends a run leaves all that was measured. What
comes first tells the most: one request at every token count, then the floors and the peer, then
more requests, and what capturing costs. The profiler comes last, on a runner of its own: it may
make launches slower for as long as the process lives.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

import torch

from benchmarks import peers
from benchmarks.bench_prefill import measure
from benchmarks.common import machine, model_runner
from benchmarks.floors import floors_ms, has_floor, kernel_classes
from benchmarks.report import modes_of
from benchmarks.suites import Shape, Suite
from breakgraph.models import PrefillModel
from breakgraph.runner import GraphRunner, ModelRunner
from breakgraph.runner.buckets import derive_buckets
from breakgraph.server_args import ServerArgs

Found = dict[str, Any]
Save = Callable[[], None]

PROFILE_SECONDS = 0.4
"""Kept back for each profile of a prefill."""

LEAST_REPEATS = 2


def sweep(
    shape: Shape, suite: Suite, deadline: float, compiled: bool, found: Found, save: Save
) -> None:
    """Fill ``found``, calling ``save`` after each figure.

    Args:
        deadline: by ``time.time()``; what is not measured then is left out.
        compiled: also measure the peer under torch.compile.
    """
    found |= {"shape": shape.name, "machine": machine(), "rows": [], "left_out": []}
    found |= {"floors": [], "kernels": [], "peers": [], "captures": [], "ladders": []}
    found["engines"] = peers.engines()
    flags = {
        **prefill_flags(),
        "piecewise_cuda_graph_tokens": suite.tokens,
        "chunked_prefill_size": suite.tokens[-1],
        "max_total_tokens": suite.tokens[-1],
        **shape.flags,
    }
    first, *others = suite.batch_sizes
    began = time.time()
    with model_runner(shape.name, **flags) as runner:
        model = runner.model
        found |= {"load_seconds": runner.load_seconds, "ready_seconds": time.time() - began}
        found["captures"] = [_capture(graphs) for graphs in runner.graph_runners]
        save()
        each = [capture["seconds"] / capture["buckets"] for capture in found["captures"]]
        bucket_seconds = max(each, default=0.0)
        rows = _Rows(runner, suite, found, save)
        rows.measure(first, deadline, suite.tokens)
        _floors(runner, suite, deadline, found)
        if shape.peers:
            for peer in peers.eager(shape.name, suite.peer_tokens, deadline):
                found["peers"].append(peer)
                save()
        # What comes after takes about this long.
        profiles = (
            PROFILE_SECONDS * len(suite.tokens) + found["ready_seconds"] - runner.load_seconds
        )
        reserve = bucket_seconds * sum(shape.ladders) + profiles
        rows.measure(first, deadline - reserve, suite.between)
        for batch_size in others:
            rows.measure(batch_size, deadline - reserve, suite.tokens)
        del runner, rows
    for count in shape.ladders:
        if time.time() + bucket_seconds * count + profiles < deadline:
            found["ladders"].append(_capture_ladder(shape, suite, count, model))
            save()
    _free()
    if shape.peers and compiled:
        for peer in peers.compiled(shape.name, suite.peer_tokens):
            found["peers"].append(peer)
            save()
    _free()
    if time.time() < deadline:
        with model_runner(shape.name, model=model, **flags) as runner:
            _profiles(runner, suite, deadline, found, save)


def prefill_flags() -> Found:
    """The most that this version captures: all modes at once where there is such a choice."""
    choices = str(get_args(get_type_hints(ServerArgs)["cuda_graph_backend_prefill"]))
    if "'auto'" in choices:
        return {"cuda_graph_backend_prefill": "auto"}
    return {"enable_breakable_cuda_graph": True}


class _Rows:
    """Prefills in every mode, timed for as long as a row may take."""

    def __init__(self, runner: ModelRunner, suite: Suite, found: Found, save: Save) -> None:
        self._runner, self._suite, self._found, self._save = runner, suite, found, save
        self._nearest: dict[int, Found] = {}

    def measure(self, batch_size: int, deadline: float, token_counts: Sequence[int]) -> None:
        """A row for each of ``token_counts`` that holds ``batch_size`` requests."""
        for tokens in (count for count in token_counts if count >= batch_size):
            about = self._round_ms(tokens)
            if time.time() + about * (3 + LEAST_REPEATS) / 1e3 > deadline:
                self._found["left_out"].append({"tokens": tokens, "batch_size": batch_size})
                continue
            row = measure(self._runner, tokens, batch_size, self._repeats(about))
            self._nearest[tokens] = row
            self._found["rows"].append(row)
            self._save()
            times = "  ".join(f"{mode} {row[f'{mode}_ms']:.3f}" for mode in modes_of(row))
            print(f"{tokens:6d} tokens, {batch_size:2d} requests: {times} ms", flush=True)

    def _round_ms(self, tokens: int) -> float:
        """About what every mode once takes, from a row near it; 0 where there is none."""
        if not self._nearest:
            return 0.0
        near = self._nearest.get(tokens) or self._nearest[max(self._nearest)]
        total = sum(near[f"{mode}_ms"] for mode in modes_of(near))
        return float(total * max(1.0, tokens / near["tokens"]))

    def _repeats(self, round_ms: float) -> int:
        """Timed rounds; ``measure`` adds three that are not."""
        if not round_ms:
            return self._suite.repeats
        fitting = int(self._suite.row_ms / round_ms) - 3
        return max(LEAST_REPEATS, min(self._suite.repeats, fitting))


def _floors(runner: ModelRunner, suite: Suite, deadline: float, found: Found) -> None:
    for tokens in suite.tokens if has_floor(runner.model) else ():
        if time.time() < deadline:
            floor = floors_ms(runner, tokens, suite.row_ms)
            found["floors"].append({"tokens": tokens} | floor)
            listed = ", ".join(f"{name[:-3]} {ms:.3f} ms" for name, ms in floor.items())
            print(f"{tokens:6d} turn by turn: {listed}", flush=True)


def _profiles(runner: ModelRunner, suite: Suite, deadline: float, found: Found, save: Save) -> None:
    """Kernel classes of one request's prefill, and with its mixers' the second floor."""
    floors = {floor["tokens"]: floor for floor in found["floors"]}
    for tokens in suite.tokens:
        if time.time() > deadline:
            return
        classes = kernel_classes(runner, tokens)
        found["kernels"].append({"tokens": tokens, "classes_ms": classes})
        if tokens in floors:
            floor, mixers = floors[tokens], classes.get("mixer", 0.0)
            floor.setdefault("products_and_mixer_ms", floor["products_ms"] + mixers)
        save()


def _capture_ladder(shape: Shape, suite: Suite, count: int, model: PrefillModel) -> Found:
    """Capture ``count`` buckets of the derived ladder, evenly chosen, the largest among them."""
    longest = suite.tokens[-1]
    ladder = derive_buckets(longest)[::-1]
    chosen = tuple(sorted(ladder[:: max(1, len(ladder) // count)][:count]))
    flags = {
        "enable_breakable_cuda_graph": True,
        "piecewise_cuda_graph_tokens": chosen,
        "chunked_prefill_size": longest,
        "max_total_tokens": longest,
        "prefill_dispatch": "always",
    }
    _free()
    with model_runner(shape.name, model=model, **flags) as runner:
        return _capture(runner.graph_runners[0])


def _capture(graphs: GraphRunner) -> Found:
    """What a capture cost, of buckets that were found not to pay too."""
    capture = {
        "kind": getattr(graphs, "kind", graphs.phase),
        "segments": graphs.graphs[graphs.buckets[-1]].num_segments,
        "buckets": len(getattr(graphs, "ladder", graphs.buckets)),
        "seconds": graphs.capture_seconds,
        "gigabytes": graphs.memory_bytes / 1e9,
    }
    print(
        f"{capture['kind']}: {capture['buckets']} buckets, {capture['segments']} segments each, "
        f"captured in {capture['seconds']:.2f} s and {capture['gigabytes']:.3f} GB",
        flush=True,
    )
    return capture


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
