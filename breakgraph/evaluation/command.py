"""``python -m breakgraph.evaluation``: accuracy under a named protocol, and graphs against eager.

Exit code 0; 1 where the two ways of ``--compare`` differ by more than chance and rounding; 2 for
a mistake, which is one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from breakgraph import __version__
from breakgraph.cli import count, guarded, log_to_stderr
from breakgraph.evaluation.answering import Answerer, Asking, EngineAnswerer, ServerAnswerer
from breakgraph.evaluation.chat import Chat
from breakgraph.evaluation.comparison import MAX_GAP, Comparison, compare
from breakgraph.evaluation.data import public_file
from breakgraph.evaluation.protocols import PROTOCOLS, Item, Protocol
from breakgraph.evaluation.report import Run, grade, write_report
from breakgraph.server_args import FlagParser, ServerArgs, flag_name

LM_EVAL = "lm-eval"
NUM_THREADS = 64
TOP = 20  # alternatives asked for with --compare; OpenAI's chat allows no more
SERVER_MAX_GAP = MAX_GAP["bfloat16"]  # a server does not say what it computes in
WITH_SERVER = {"api_key", "served_model_name", "log_level", "command", "num_threads"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == [LM_EVAL]:
        level = argparse.Namespace(log_level="debug" if "DEBUG" in argv else None)
        return guarded(lambda _: _lm_eval(argv[1:]), level, f"breakgraph.evaluation {LM_EVAL}")
    return guarded(_evaluate, _parser().parse_args(argv), "breakgraph.evaluation")


def _lm_eval(argv: Sequence[str]) -> int:
    """The command line of lm-evaluation-harness, with this engine and its task files named.

    Its own command cannot be told of a model that it did not bring.
    """
    try:
        import breakgraph.evaluation.lm_eval_model  # noqa: F401 - registers the model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ImportError(f"{LM_EVAL} needs lm-eval: pip install 'breakgraph[eval]'") from error
    from lm_eval.__main__ import cli_evaluate

    from breakgraph.evaluation.tasks import FOLDER

    ours = ["run", "--model", "breakgraph", "--include_path", str(FOLDER)]
    given = sys.argv
    # What follows wins over what comes first; another sub-command takes none of it.
    sys.argv = [LM_EVAL, *(ours if argv[:1] and argv[0].startswith("--") else ()), *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = given
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="python -m breakgraph.evaluation",
        description="Accuracy on word problems, in process or of a server of OpenAI's API.",
    )
    tasks = parser.add_subparsers(required=True, metavar="TASK", dest="task")
    for task, protocol in PROTOCOLS.items():
        command = tasks.add_parser(task, help=protocol.name, description=protocol.__doc__)
        _add_flags(command, protocol)
        ServerArgs.add_cli_args(command)
    # Listed here for --help alone: what follows it is parsed by lm-eval.
    tasks.add_parser(LM_EVAL, help="any task of lm-evaluation-harness, by this engine")
    return parser


def _add_flags(command: argparse.ArgumentParser, protocol: Protocol) -> None:
    add = command.add_argument
    add("--base-url", metavar="URL", help="ask this server; without it the engine, in process")
    add(
        "--data-path",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="the questions: JSON lines of gsm8k, or mgsm_XX.tsv of one or more languages "
        "(default: the public English file, fetched once)",
    )
    add("--num-questions", type=count, metavar="N", help="the first N of each file (default: all)")
    add(
        "--num-shots",
        type=int,
        default=protocol.shots,
        metavar="N",
        help=f"worked questions before each, not scored (default: {protocol.shots})",
    )
    add(
        "--max-new-tokens",
        type=count,
        default=protocol.max_new_tokens,
        metavar="N",
        help=f"most tokens of an answer (default: {protocol.max_new_tokens})",
    )
    add(
        "--num-threads",
        type=count,
        metavar="N",
        help=f"requests at once to --base-url (default: {NUM_THREADS})",
    )
    add(
        "--chat",
        nargs="?",
        const={},
        type=_options,
        metavar="JSON",
        help="ask by the chat template, with these options for it, such as "
        "'{\"enable_thinking\": false}'",
    )
    add("--output", type=Path, metavar="FILE.json", help="every question, answer and verdict")
    add(
        "--compare",
        choices=("eager",),
        help="ask again without graphs; exit code 1 if that makes a significant difference",
    )
    add("--eager-url", metavar="URL", help="with --base-url: the same model served without graphs")
    add(
        "--max-gap",
        type=float,
        metavar="NATS",
        help="how far rounding may move a log-probability (default: "
        + ", ".join(f"{gap:g} in {dtype}" for dtype, gap in MAX_GAP.items())
        + f", {SERVER_MAX_GAP:g} with --base-url)",
    )


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return options


def _evaluate(namespace: argparse.Namespace) -> int:
    protocol = PROTOCOLS[namespace.task]
    _check(namespace)
    args = ServerArgs.from_cli_args(namespace) if namespace.base_url is None else None
    log_to_stderr(getattr(namespace, "log_level", "warning") if args is None else args.log_level)
    graphs = args is None or args.resolved().cuda_graph_backend_prefill != "disabled"
    if namespace.compare and not graphs:
        raise ValueError(
            "--compare eager has no graphs to compare with: add --enable-breakable-cuda-graph, or "
            "--cuda-graph-backend-prefill full or auto"
        )
    paths = namespace.data_path or [public_file(namespace.task)]
    items = protocol.items(paths, namespace.num_questions, namespace.num_shots)
    asking = Asking(
        max_new_tokens=namespace.max_new_tokens,
        stop=protocol.stop,
        logprobs=TOP if namespace.compare else None,
        chat=None if namespace.chat is None else Chat(namespace.chat),
    )
    print(f"{protocol.name}: {len(items)} questions, {namespace.num_shots} shots")
    with ExitStack() as stack:
        ways, max_gap = _ways(namespace, args, asking, stack)
        runs = [_run(name, answerer, protocol, items) for name, answerer in ways.items()]
        if namespace.compare:
            _check_replayed(ways["graphs"])
    comparison = _compare(runs, max_gap) if namespace.compare else None
    for run in runs:
        print("\n".join(run.lines()))
    if comparison is not None:
        print("\n".join(comparison.lines(*(run.name for run in runs))))
    if namespace.output is not None:
        head = {
            "protocol": protocol.name,
            "breakgraph": __version__,
            "model": namespace.base_url or (args and args.model_path),
            "data": paths,
            "shots_per_question": namespace.num_shots,
            "max_new_tokens": namespace.max_new_tokens,
            "chat": namespace.chat,
            "comparison": comparison
            and asdict(comparison) | {"significant": comparison.significant},
        }
        write_report(namespace.output, head, runs)
    return 1 if comparison is not None and comparison.significant else 0


def _check(namespace: argparse.Namespace) -> None:
    """Flags that contradict each other, or would be ignored in silence."""
    given = {name for name in ServerArgs.__slots__ if hasattr(namespace, name)}
    if hasattr(namespace, "config"):
        given.add("config")
    if namespace.base_url is None:
        for name in ("num_threads", "eager_url"):
            if getattr(namespace, name) is not None:
                raise ValueError(f"{flag_name(name)} does nothing without --base-url; leave it out")
    elif unused := sorted(given - WITH_SERVER):
        raise ValueError(
            f"{flag_name(unused[0])} does nothing with --base-url, whose server was started with "
            "flags of its own; leave it out"
        )
    if namespace.base_url is not None and bool(namespace.compare) != bool(namespace.eager_url):
        raise ValueError("--compare eager and --eager-url go together where --base-url is given")
    if namespace.max_gap is not None and not namespace.compare:
        raise ValueError("--max-gap does nothing without --compare; leave it out")
    if namespace.num_shots < 0:
        raise ValueError(f"--num-shots is at least 0, not {namespace.num_shots}")
    if namespace.output is not None and not namespace.output.absolute().parent.is_dir():
        raise ValueError(f"--output: there is no folder {namespace.output.absolute().parent}")


def _ways(
    namespace: argparse.Namespace, args: ServerArgs | None, asking: Asking, stack: ExitStack
) -> tuple[dict[str, Answerer], float]:
    """Who answers, by name, and how far rounding may move a log-probability."""
    ways: dict[str, Answerer] = {}
    if args is None:
        urls = {"graphs" if namespace.compare else "server": namespace.base_url}
        urls |= {"eager": namespace.eager_url} if namespace.compare else {}
        for name, url in urls.items():
            ways[name] = ServerAnswerer(
                url,
                asking,
                num_threads=namespace.num_threads or NUM_THREADS,
                api_key=getattr(namespace, "api_key", None),
                model=getattr(namespace, "served_model_name", None),
            )
        gap = SERVER_MAX_GAP
    else:
        from breakgraph.engine import Engine  # takes seconds: mistakes come first

        engine = stack.enter_context(Engine(args))
        ways["graphs" if namespace.compare else "engine"] = EngineAnswerer(engine, asking)
        if namespace.compare:
            ways["eager"] = EngineAnswerer(engine, asking, allow_graph=False)
        gap = MAX_GAP[str(engine.runner.dtype).removeprefix("torch.")]
    return ways, gap if namespace.max_gap is None else namespace.max_gap


def _run(name: str, answerer: Answerer, protocol: Protocol, items: Sequence[Item]) -> Run:
    start = time.perf_counter()
    answers = answerer.answer([item.prompt for item in items], name)
    seconds = time.perf_counter() - start
    return Run(name=name, graded=grade(protocol, items, answers), seconds=seconds)


def _check_replayed(answerer: Answerer) -> None:
    if not isinstance(answerer, EngineAnswerer):
        return
    print(f"prefills replayed: {answerer.replayed} of {answerer.prefills}")
    if not answerer.replayed:
        raise ValueError(
            "no prefill was replayed, so there is nothing to compare; `breakgraph explain` says "
            "why, and --prefill-dispatch always replays all that fits a bucket"
        )


def _compare(runs: Sequence[Run], max_gap: float) -> Comparison:
    first, second = (run.graded for run in runs)
    right = [
        (a.verdict == "right", b.verdict == "right") for a, b in zip(first, second, strict=True)
    ]
    return compare([a.answer for a in first], [b.answer for b in second], right, max_gap)
