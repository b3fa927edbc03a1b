"""From process start to the first token, and where the time goes.

A process of its own per run, timed from before it is started; each phase counts what is its own,
not what is inside another, so the parts add up to the whole. Weights are dummy ones, or, with
``--load-format auto``, a checkpoint that is written before and read from the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shapes import model_folder, shape_names

GOAL_SECONDS, GOAL_BUCKET_MS = 12.0, 25.0


class Phases:
    """Seconds by phase; one within another interrupts it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watch(self, owner: Any, function: str, name: str | Callable[..., str]) -> None:
        """Count calls of ``owner.function`` as a phase, named by their first argument or fixed."""
        plain = getattr(owner, function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(args[0])):
                return plain(*args, **kwargs)

        setattr(owner, function, watched)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            innermost = self._open[-1]
            self.seconds[innermost] = self.seconds.get(innermost, 0.0) + now - self._since
        self._since = now


def start(folder: str, load_format: str, tokens: int, began: float) -> dict[str, Any]:
    """Start an engine in this process, and answer a prompt of ``tokens``."""
    phases = Phases()
    phases.seconds["python"] = time.time() - began
    with phases.phase("other"):
        with phases.phase("import torch"):
            import torch
        with phases.phase("import transformers"):
            import transformers

            _ = transformers.AutoConfig, transformers.PreTrainedConfig
        with phases.phase("import breakgraph"):
            from breakgraph.engine import Engine, engine
            from breakgraph.kernels.launch import import_triton
            from breakgraph.models import weights
            from breakgraph.runner import GraphRunner, measuring, model_runner
        cuda = torch.cuda.is_available()
        with phases.phase("CUDA context"):
            torch.empty(0, device="cuda" if cuda else "cpu")
        if cuda:
            with phases.phase("import triton"):
                import_triton()
        phases.watch(engine, "load_tokenizer", "tokenizer")
        phases.watch(model_runner, "load_model", "weights")
        phases.watch(weights, "_build", "model on the meta device")
        phases.watch(weights, "read_config", "config")
        phases.watch(model_runner, "use_own_products", "kernels of products")
        phases.watch(model_runner, "prefill_backend", "attention kernels")
        phases.watch(model_runner, "make_kv_pool", "KV pool")
        phases.watch(model_runner, "make_mamba_pool", "state pool")
        phases.watch(GraphRunner, "capture", lambda graphs: f"capture {_kind(graphs)}")
        phases.watch(GraphRunner, "_warm_up", lambda graphs: f"warm up {_kind(graphs)}")
        phases.watch(measuring.CostMeter, "measure", "measure")
        with Engine(
            model_path=folder,
            load_format=load_format,
            skip_tokenizer_init=True,
            enable_breakable_cuda_graph=True,
        ) as ready:
            whole = time.time() - began
            captured = {
                _kind(graphs): {
                    "buckets": len(getattr(graphs, "ladder", graphs.buckets)),
                    "seconds": phases.seconds[f"capture {_kind(graphs)}"],
                }
                for graphs in ready.runner.graph_runners
            }
            with phases.phase("first token"):
                ready.generate([[1 + at % 100 for at in range(tokens)]], 1)
            first = time.time() - began
    return {
        "ready_seconds": whole,
        "first_token_seconds": first,
        "phases": phases.seconds,
        "captured": captured,
    }


def _kind(graphs: Any) -> str:
    """``prefill, breakable`` or ``decode``."""
    kind = getattr(graphs, "kind", "")
    return f"{graphs.phase}, {kind}" if kind else str(graphs.phase)


def run(shape: str, load_format: str, tokens: int, folder: Path) -> dict[str, Any]:
    """One start in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_startup", "--shape", shape]
    command += ["--load-format", load_format, "--tokens", str(tokens)]
    command += ["--child", str(folder), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the start failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(found: dict[str, Any]) -> None:
    """The parts, the most time first, and the two figures that have a goal."""
    for name, seconds in sorted(found["phases"].items(), key=lambda item: -item[1]):
        print(f"  {seconds:7.2f} s  {name}")
    for kind, captured in found["captured"].items():
        each = 1e3 * captured["seconds"] / captured["buckets"]
        print(
            f"{kind}: {captured['buckets']} buckets, {each:.1f} ms each, goal at most "
            f"{GOAL_BUCKET_MS:g}"
        )
    print(
        f"ready after {found['ready_seconds']:.2f} s, first token after "
        f"{found['first_token_seconds']:.2f} s, goal at most {GOAL_SECONDS:g}",
        flush=True,
    )


def save_checkpoint(shape: str, folder: Path) -> None:
    """The shape's class of transformers with random weights, as safetensors of up to 5 GB each.

    By a process of its own, so that the device is free afterwards.
    """
    code = "import sys; from benchmarks.peers import class_of_transformers as made; "
    code += "made(sys.argv[1]).save_pretrained(sys.argv[2], max_shard_size='5GB')"
    subprocess.run([sys.executable, "-c", code, shape, str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-8b")
    parser.add_argument("--load-format", choices=("dummy", "auto"), default="dummy")
    parser.add_argument("--tokens", type=int, default=128, help="of the first prompt")
    parser.add_argument("--runs", type=int, default=2, help="starts; the first finds caches cold")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        folder, began = args.child
        print("\n" + json.dumps(start(folder, args.load_format, args.tokens, float(began))))
        return
    runs = []
    with model_folder(args.shape) as folder:
        if args.load_format == "auto":
            save_checkpoint(args.shape, Path(folder))
        for number in range(args.runs):
            runs.append(run(args.shape, args.load_format, args.tokens, Path(folder)))
            print(f"\n{args.shape}, {args.load_format} weights, start {number + 1}")
            show(runs[-1])
    from benchmarks.common import write_json

    write_json(args.output, {"shape": args.shape, "load_format": args.load_format, "runs": runs})


if __name__ == "__main__":
    main()
