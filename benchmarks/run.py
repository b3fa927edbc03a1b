"""Every figure of a machine in one command: ``python -m benchmarks.run --suite h200``.

Each shape runs in a process of its own, with its share of the time that is left, and writes its
JSON after every figure: what is killed, or fails, leaves what it had measured. The tables and the
plots are made of the JSON files alone (``python -m benchmarks.report FOLDER`` makes them anew).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.report import write_report
from benchmarks.suites import SUITES, Shape, Suite

GRACE_SECONDS = 60.0
"""How long a shape may go on behind its deadline before its process is ended."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="h200")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these shapes of the suite")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to")
    parser.add_argument("--seconds", type=float, help="time for all of it (default: the suite's)")
    parser.add_argument(
        "--peers", action="store_true", help="also transformers compiled, minutes for each shape"
    )
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # of one shape's process
    args = parser.parse_args()
    suite = SUITES[args.suite]
    names = args.only or [shape.name for shape in suite.shapes]
    known = {shape.name: shape for shape in suite.shapes}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--suite {args.suite} has no {', '.join(unknown)}; it has {', '.join(known)}")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.deadline is not None:
        raise SystemExit(run_shape(known[names[0]], suite, args.deadline, args.peers, args.output))
    end = time.time() + (args.seconds or suite.seconds)
    shapes = [known[name] for name in names]
    for at, shape in enumerate(shapes):
        left = end - time.time()
        if left <= 0:
            print(f"{shape.name}: left out, the time is over", flush=True)
            continue
        share = left * shape.weight / sum(one.weight for one in shapes[at:])
        run_process(shape, share, args)
        write_report(args.output)
    print(f"written to {args.output} with {max(0.0, end - time.time()):.0f} s to spare")


def run_process(shape: Shape, seconds: float, args: argparse.Namespace) -> None:
    """Measure ``shape`` in a process that should end within ``seconds``."""
    print(f"\n{shape.name}, {seconds:.0f} s", flush=True)
    command = [sys.executable, "-m", "benchmarks.run", "--suite", args.suite]
    command += ["--only", shape.name, "--output", str(args.output)]
    command += ["--deadline", str(time.time() + seconds), *(["--peers"] * args.peers)]
    limit = None if args.peers else seconds + GRACE_SECONDS
    try:
        with (args.output / f"{shape.name}.log").open("w") as log:
            done = subprocess.run(command, stderr=log, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{shape.name}: ended {GRACE_SECONDS:.0f} s behind its deadline", flush=True)
        return
    if done.returncode:
        print(f"{shape.name}: exit code {done.returncode}, see {shape.name}.log", flush=True)


def run_shape(shape: Shape, suite: Suite, deadline: float, peers: bool, folder: Path) -> int:
    """Measure ``shape`` here; returns the exit code, 1 where it was cut short by an error."""
    import torch  # not for the process that only starts others

    from benchmarks.sweep import sweep

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # shapes for a CPU are so small that threads wait for each other
    found: dict[str, Any] = {}

    def save() -> None:
        path = folder / f"{shape.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(path)

    try:
        sweep(shape, suite, deadline, peers, found, save)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        save()
        print(f"{shape.name}: {found['error']}", flush=True)
        traceback.print_exc()
        return 1
    save()
    return 0


if __name__ == "__main__":
    main()
