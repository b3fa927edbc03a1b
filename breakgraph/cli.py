"""The command line: what the offline engine and the server do, from a shell.

Whatever a user can get wrong is one line on stderr and exit code 2. Results go to stdout,
progress and log lines to stderr.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from breakgraph import STARTED, __version__
from breakgraph.evaluation.questions import Question, is_right, read_questions
from breakgraph.inspection import command as inspection
from breakgraph.server_args import FlagParser, ServerArgs

if TYPE_CHECKING:
    from breakgraph.engine import Engine, GenerateResult, Statistics

SAMPLES = 3
SERVING = ("fastapi", "prometheus_client", "pydantic", "uvicorn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 where answers differ, 2 for a mistake."""

    def run(namespace: argparse.Namespace) -> int:
        args = ServerArgs.from_cli_args(namespace)
        log_to_stderr(args.log_level)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from breakgraph.distributed.ranks import check_torchrun

            check_torchrun(args)
        return int(namespace.command(args, namespace))

    return guarded(run, _parser().parse_args(argv), "breakgraph")


def guarded(
    run: Callable[[argparse.Namespace], int], namespace: argparse.Namespace, prog: str
) -> int:
    """Run what was parsed; a mistake becomes one line on stderr and exit code 2."""
    try:
        return run(namespace)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if getattr(namespace, "log_level", None) == "debug":
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print(f"{prog}: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def log_to_stderr(level: str) -> None:
    """Log lines of this severity and above."""
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="breakgraph", description="Prefill of language models by breakable CUDA graphs."
    )
    parser.add_argument("--version", action="version", version=f"breakgraph {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="answer prompts or a file of questions", description="Answer prompts."
    )
    what = run.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a text to continue; may be repeated"
    )
    what.add_argument(
        "--questions",
        metavar="FILE.jsonl",
        help='word problems to grade, a line each: {"question": "…", "answer": "… #### N"}',
    )
    run.add_argument(
        "--num-questions", type=count, metavar="N", help="answer the first N only (default: all)"
    )
    run.add_argument(
        "--max-new-tokens",
        type=count,
        default=256,
        metavar="N",
        help="most tokens of an answer (default: 256)",
    )
    run.add_argument(
        "--compare-eager",
        action="store_true",
        help="answer again without graphs; exit code 1 if any answer differs",
    )
    run.set_defaults(command=_run)

    explain = commands.add_parser(
        "explain",
        help="say how prompts of given lengths would run",
        description="Say into which forwards prompts would be packed, and how each would run.",
    )
    explain.add_argument(
        "--num-tokens", type=count, nargs="+", required=True, metavar="N", help="prompt lengths"
    )
    explain.set_defaults(command=_explain)

    inspect = commands.add_parser(
        "inspect",
        help="show where a prefill's time and memory go, as a picture",
        description=inspection.DESCRIPTION,
    )
    inspection.add_flags(inspect)
    inspect.set_defaults(command=inspection.run)

    serve = commands.add_parser(
        "serve",
        help="answer HTTP requests",
        description="Serve OpenAI's API, and a page to try it on, over HTTP.",
    )
    serve.set_defaults(command=_serve)
    for command in (run, explain, inspect, serve):
        ServerArgs.add_cli_args(command)
    return parser


def count(text: str) -> int:
    """A flag's value of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def _run(args: ServerArgs, namespace: argparse.Namespace) -> int:
    questions = None
    if namespace.questions is not None:
        questions = read_questions(namespace.questions)[: namespace.num_questions]
    elif namespace.num_questions is not None:
        raise ValueError("--num-questions does nothing without --questions; leave it out")
    prompts = [q.prompt for q in questions] if questions else namespace.prompt

    from breakgraph.engine import Engine  # torch and transformers take seconds: mistakes come first
    from breakgraph.engine.start_up import ready_text

    imported = time.perf_counter()
    with Engine(args) as engine:
        print(ready_text(engine.runner, imported), file=sys.stderr)
        asked = time.perf_counter()
        results = engine.generate(prompts, namespace.max_new_tokens, progress=True)
        graphs = copy.deepcopy(engine.statistics)
        if questions:
            print_accuracy(questions, results)
        else:
            for prompt, result in zip(prompts, results, strict=True):
                print(f"{prompt}{result.text}\n")
        again = None
        if namespace.compare_eager:
            again = engine.generate(
                prompts, namespace.max_new_tokens, allow_graph=False, progress=True
            )
        print_table(engine, graphs, asked)
    if again is None:
        return 0
    differing = [i for i, (a, b) in enumerate(zip(results, again, strict=True)) if a.text != b.text]
    print(f"prefills replayed: {graphs.replays} of {graphs.prefills}")
    print(f"answers the same without graphs: {len(results) - len(differing)} of {len(results)}")
    for index in differing[:SAMPLES]:
        print(f"  prompt {index}: {results[index].text!r} became {again[index].text!r}")
    return 1 if differing else 0


def _explain(args: ServerArgs, namespace: argparse.Namespace) -> int:
    from breakgraph.engine import Engine

    with Engine(args) as engine:
        print(engine.explain([[0] * count for count in namespace.num_tokens]))
    return 0


def _serve(args: ServerArgs, namespace: argparse.Namespace) -> int:
    missing = [name for name in SERVING if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"serving needs {', '.join(missing)}: pip install 'breakgraph[serve]'")
    from breakgraph.server.serve import serve

    serve(args)
    return 0


def print_accuracy(questions: Sequence[Question], results: Sequence[GenerateResult]) -> None:
    """Some answers, then how many are right."""
    right = [is_right(q, r.text) for q, r in zip(questions, results, strict=True)]
    for question, result, ok in list(zip(questions, results, right, strict=True))[:SAMPLES]:
        print(f"{question.prompt}{result.text}")
        print("  right\n" if ok else f"  wrong: it is {question.answer:g}\n")
    print(f"accuracy: {sum(right)}/{len(right)} ({100 * sum(right) / len(right):.1f} %)")


def print_table(engine: Engine, graphs: Statistics, asked: float) -> None:
    """What the first pass did, begun at ``asked``, and what prefill cost over all passes."""
    total = engine.statistics
    rows = [
        ("prompts", f"{graphs.prompts}"),
        ("prompt tokens", f"{graphs.prompt_tokens}"),
        ("generated tokens", f"{graphs.generated_tokens} in {graphs.decodes} decode forwards"),
        ("prefill forwards", ", ".join(f"{n} {reason}" for reason, n in graphs.reasons.items())),
        (
            "bucket hits",
            ", ".join(f"{bucket} × {n}" for bucket, n in sorted(graphs.buckets.items())) or "none",
        ),
    ]
    if graphs.replays:
        rows.append(("padding", f"{100 * graphs.padding:.1f} % of the rows replayed"))
    for runner in engine.runner.prefill_graph_runners:
        graph = runner.graphs[runner.buckets[-1]]
        shape = f"{graph.num_segments} segments, {graph.num_breaks} breaks each"
        name = "graphs" if runner.kind == "breakable" else f"{runner.kind} graphs"
        rows.append((name, f"{len(runner.buckets)} buckets, {shape}"))
    eager = total.prefills - total.replays
    for name, ms, count in (
        ("prefill replayed", total.replayed_ms, total.replays),
        ("prefill eager", total.eager_ms, eager),
    ):
        if count:
            rows.append((name, f"{ms:.1f} ms in {count} forwards, {ms / count:.2f} ms each"))
    if first := graphs.first_token_at:
        after = f"{1e3 * (first - asked):.1f} ms after the prompts"
        rows.append(("first token", f"{after}, {first - STARTED:.1f} s after the start"))
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows))
