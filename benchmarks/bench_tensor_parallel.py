"""Prefill over several GPUs, eager against graphs, and the collectives alone.

Every rank runs this file. Rank 0 drives: its forwards go out to the others as in service, so that
a row holds what a request would wait for, from host token ids to last-token logits. The two ways
take turns, so that drift meets both alike. A collective is timed as the layers call it, on a
``[tokens, hidden_size]`` of the shape: launched one by one, and as ``CALLS`` in a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    SHAPES,
    machine,
    median,
    prefill_request,
    shape_names,
    timed,
    write_json,
)
from breakgraph.distributed import TensorParallelGroup
from breakgraph.distributed.lockstep import INLINE, follow
from breakgraph.distributed.ranks import Ranks, end_all, environ_has_torchrun, start_ranks
from breakgraph.forward import ForwardBatch
from breakgraph.runner import ModelRunner
from breakgraph.server_args import ServerArgs

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CALLS = 20
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")


class Lent(Ranks):
    """Ranks that outlive a model: its end is not theirs."""

    def close(self, *, agreed: bool = True) -> None:
        pass


@contextmanager
def ranks_of(args: argparse.Namespace) -> Iterator[Ranks]:
    """This process among its ranks; it spawns the others, unless torchrun started all."""
    children = []
    if args.tp_size > 1 and not environ_has_torchrun():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": args.tp_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(args.tp_size):
            environ = {name: str(value) for name, value in place.items()}
            environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                os.environ.update(environ)
            else:
                environ = os.environ | environ
                command = [sys.executable, "-m", "benchmarks.bench_tensor_parallel", *sys.argv[1:]]
                children.append(subprocess.Popen(command, env=environ))
    ranks = start_ranks(ServerArgs(model_path="none", device=args.device, tp_size=args.tp_size))
    try:
        yield ranks
    except BaseException:
        traceback.print_exc()
        end_all(children, 0.0)
        os._exit(1)  # what waits for the other ranks would wait for long
    ranks.close()
    end_all(children, 20.0)


@contextmanager
def model(ranks: Ranks, folder: str, args: argparse.Namespace, scatter: bool) -> Iterator[Any]:
    """A runner for one config: dummy weights, a graph for each count of tokens, decode eager."""
    flags = ServerArgs(
        model_path=folder,
        device=args.device,
        tp_size=args.tp_size,
        moe_scatter=scatter,
        load_format="dummy",
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        enable_breakable_cuda_graph=True,
        piecewise_cuda_graph_tokens=tuple(args.tokens),
        prefill_dispatch="always",
        chunked_prefill_size=max(args.tokens),
        max_total_tokens=max(args.tokens),
    )
    lent = ranks if ranks.watch is None else Lent(ranks.group, ranks.watch)
    lent.group.scatters_rows = scatter and args.tp_size > 1
    with lent.together():
        runner = ModelRunner(flags, ranks=lent)
    yield runner
    if lent.group.is_first:
        runner.stop_ranks()
    else:
        follow(lent, runner)
    del runner
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(runner: ModelRunner, num_tokens: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """One row: medians in milliseconds, of wall clock and of CUDA events, and how far the logits
    of both ways are apart, as a share of their norm."""
    request = prefill_request(runner.vocab_size, num_tokens, batch_size)

    def prefill(graph: bool) -> torch.Tensor:
        result = runner.forward(ForwardBatch.from_requests(*request), allow_graph=graph)
        if graph and result.dispatch.bucket != num_tokens:
            raise RuntimeError(f"not replayed: {result.dispatch.describe()}")
        assert result.next_token_logits is not None
        return result.next_token_logits

    ways = {"eager": False, "breakable": True}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 3):
        for name, graph in ways.items():
            taken = timed(lambda graph=graph: prefill(graph))
            if repeat >= 3:
                times[name].append(taken)
    row: dict[str, Any] = {"tokens": num_tokens, "batch_size": batch_size}
    for name in ways:
        row[f"{name}_ms"] = median([wall for wall, _ in times[name]])
        row[f"{name}_event_ms"] = median([event for _, event in times[name]])
    row["speedup"] = row["eager_ms"] / row["breakable_ms"]
    eager, replayed = prefill(False).double(), prefill(True).double()
    row["difference"] = float((eager - replayed).norm() / eager.norm())
    return row


def collectives(
    group: TensorParallelGroup, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Microseconds of each collective, one after the other: the median of ``--repeats``."""
    rows = []
    for hidden in sorted({hidden_size(folder) for folder in map(config_of, args.shape)}):
        for tokens in args.tokens:
            whole = torch.randn(tokens, hidden, dtype=dtype, device=device)
            part = whole[: group.rows_of_rank(tokens)].clone()
            row: dict[str, Any] = {"tokens": tokens, "hidden_size": hidden, "bytes": whole.nbytes}
            row["call"] = {
                "all_reduce": lambda x=whole: group.all_reduce_(x),
                "reduce_scatter": lambda x=whole: group.reduce_scatter(x),
                "all_gather": lambda x=part: group.all_gather(x),
            }
            rows.append(row)
    for row in rows:
        for name, call in row["call"].items():
            row[f"{name}_launched_us"] = call_us(group, lambda call=call: repeat(call), args)
    # Captures come last: each would wait 0.1 s until NCCL's watchdog has seen launched work end.
    for row in rows:
        for name, call in row.pop("call").items():
            if device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    repeat(call)
                row[f"{name}_captured_us"] = call_us(group, graph.replay, args)
                graph.reset()  # or the communicator could not end
    return rows


def repeat(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def call_us(
    group: TensorParallelGroup, calls: Callable[[], object], args: argparse.Namespace
) -> float:
    """Microseconds of one of ``CALLS`` collectives; on CUDA from when all ranks are under way."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    times = []
    for count in range(args.repeats + 2):
        group.barrier()
        if cuda:
            calls()  # the ranks come out of it together
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls()
            end.record()
            torch.cuda.synchronize()
            taken = start.elapsed_time(end)
        else:
            taken = timed(calls)[0]
        if count >= 2:
            times.append(taken)
    return median(times) * 1e3 / CALLS


def broadcast_us(group: TensorParallelGroup, count: int = 200) -> float:
    """Microseconds of what tells the other ranks a batch, between the hosts' processes."""
    message = torch.zeros(INLINE, dtype=torch.int64)
    group.barrier()
    began = time.perf_counter()
    for _ in range(count):
        group.broadcast(message)
    group.barrier()
    return (time.perf_counter() - began) * 1e6 / count


def config_of(shape: str) -> Path:
    """The config.json of a shape by name, or of a model folder."""
    named = SHAPES / f"{shape}.json"
    path = named if named.exists() else Path(shape) / "config.json"
    if not path.exists():
        raise SystemExit(f"--shape {shape} is no model folder and none of {shape_names()}")
    return path


def hidden_size(config: Path) -> int:
    return int(json.loads(config.read_text())["hidden_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp-size", type=int, default=2, help="ranks; 1 gives what to compare to")
    parser.add_argument("--shape", nargs="+", default=["qwen3-8b", "qwen3-30b-a3b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1,))
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--moe-scatter",
        action="store_true",
        help="run shapes with experts a second time, each rank routing its own rows",
    )
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    began = time.perf_counter()
    shapes = [(shape, config_of(shape)) for shape in args.shape]
    with ranks_of(args) as ranks:
        report = Report(args, quiet=not ranks.group.is_first)
        report.line(
            f"{args.tp_size} ranks on {machine()} after {time.perf_counter() - began:.1f} s"
        )
        if ranks.watch is not None:
            with ranks.together():
                time_collectives(ranks.group, args, report)
        for shape, config in shapes:
            experts = "num_experts" in json.loads(config.read_text())
            for scatter in (False, True) if args.moe_scatter and experts else (False,):
                time_prefills(ranks, shape, config, scatter, args, report)
    report.line(f"all in {time.perf_counter() - began:.1f} s")


class Report:
    """What was measured, printed and written as it comes: a later fault loses nothing."""

    def __init__(self, args: argparse.Namespace, *, quiet: bool) -> None:
        self.output, self.quiet = args.output, quiet
        environ = {name: text for name, text in os.environ.items() if name.startswith("NCCL_")}
        self.result: dict[str, Any] = {"tp_size": args.tp_size, "repeats": args.repeats}
        self.result |= {"environ": environ, "collectives": [], "models": []}

    def line(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)
            write_json(self.output, self.result)


def time_collectives(group: TensorParallelGroup, args: argparse.Namespace, report: Report) -> None:
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", group.local_rank) if cuda else torch.device("cpu")
    report.result["broadcast_us"] = broadcast_us(group)
    rows = collectives(group, device, torch.bfloat16 if cuda else torch.float32, args)
    report.result["collectives"] = rows
    report.line(f"a batch to the other ranks: {report.result['broadcast_us']:.0f} µs")
    report.line("µs a collective, launched / captured")
    report.line(
        f"{'hidden':>6} {'tokens':>6} {'KiB':>6}" + "".join(f"{n:>18}" for n in COLLECTIVES)
    )
    for row in rows:
        text = f"{row['hidden_size']:6d} {row['tokens']:6d} {row['bytes'] // 1024:6d}"
        for name in COLLECTIVES:
            captured = row.get(f"{name}_captured_us", float("nan"))
            text += f"{row[f'{name}_launched_us']:9.1f} /{captured:7.1f}"
        report.line(text)


def time_prefills(
    ranks: Ranks,
    shape: str,
    config: Path,
    scatter: bool,
    args: argparse.Namespace,
    report: Report,
) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder) / "config.json")
        with model(ranks, folder, args, scatter) as runner:
            if not ranks.group.is_first:
                return
            graphs = runner.graph_runner
            if graphs is None:
                raise SystemExit(f"{shape} offers no layer stack, so there is nothing to compare")
            found: dict[str, Any] = {
                "shape": shape,
                "moe_scatter": scatter,
                "load_seconds": runner.load_seconds,
                "capture_seconds": graphs.capture_seconds,
                "graph_bytes": graphs.memory_bytes,
                "rows": [],
            }
            report.result["models"].append(found)
            report.line(
                f"{shape}{' --moe-scatter' if scatter else ''}: loaded in "
                f"{runner.load_seconds:.1f} s, {len(graphs.buckets)} graphs captured in "
                f"{graphs.capture_seconds:.1f} s and {graphs.memory_bytes / 1e6:.0f} MB, ready "
                f"after {time.perf_counter() - began:.1f} s"
            )
            report.line("tokens  bs   eager ms  breakable ms  speed-up  difference")
            for tokens in args.tokens:
                for size in args.batch_sizes:
                    row = measure(runner, tokens, size, args.repeats)
                    found["rows"].append(row)
                    report.line(
                        f"{tokens:6d} {size:3d} {row['eager_ms']:10.3f} "
                        f"{row['breakable_ms']:13.3f} {row['speedup']:8.2f}x "
                        f"{row['difference']:11.1e}"
                    )


if __name__ == "__main__":
    main()
