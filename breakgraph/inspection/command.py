"""``breakgraph inspect``: one batch, one graph, one picture.

Only the bucket that the flags' ladder has for the batch is captured, always replayed, and decode
graphs are left out; everything else runs as the flags say.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from breakgraph.server_args import ServerArgs

if TYPE_CHECKING:
    from breakgraph.forward import ForwardBatch
    from breakgraph.inspection.gather import Inspection
    from breakgraph.runner import ModelRunner

DESCRIPTION = """Show where a prefill's time and memory go: the segments of its graph to scale, the
breaks with their host time, gaps, padding, the pool's bytes, and the eager forward over the replay.
Prints a summary and a table; --html and --png write the picture too. On a GPU kernels are timed by
CUPTI, on a CPU ops are timed on the tape. Graphs are enabled by the command itself."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tokens", type=_length, metavar="N", help="inspect one prompt of N random tokens"
    )
    what.add_argument(
        "--lengths",
        type=_lengths,
        metavar="N,N,…",
        help="inspect one batch of several prompts of random tokens, such as 30,50",
    )
    what.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="inspect a batch of this text; may be repeated",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the picture as one page")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="write it as a PNG; needs Chromium or Chrome"
    )
    parser.add_argument(
        "--repeats", type=_length, default=10, metavar="N", help="runs to time (default: 10)"
    )


def run(args: ServerArgs, namespace: argparse.Namespace) -> int:
    """Inspect, print and write. Raises ValueError or RuntimeError for what is wrong."""
    from breakgraph.inspection.gather import inspect_forward
    from breakgraph.inspection.page import page
    from breakgraph.inspection.png import find_browser, write_png

    if namespace.png is not None:
        find_browser()  # the mistake comes before the minutes that a large model takes
    for path in (namespace.html, namespace.png):
        if path is not None and path.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder; name a file in it")
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path} cannot be written: its folder does not exist")
    seen = inspect_forward(*prepare(args, namespace), repeats=namespace.repeats)
    print(report(seen))
    html = page(seen)
    if namespace.html is not None:
        namespace.html.write_text(html, encoding="utf-8")
        print(f"wrote {namespace.html}")
    if namespace.png is not None:
        write_png(html, namespace.png)
        print(f"wrote {namespace.png}")
    return 0


def prepare(args: ServerArgs, namespace: argparse.Namespace) -> tuple[ModelRunner, ForwardBatch]:
    """A runner with the one graph that the batch takes, and the batch.

    Raises:
        ValueError: a flag, the batch or the model leaves no graph to inspect.
    """
    from breakgraph.engine.tokenization import PromptEncoder, load_tokenizer
    from breakgraph.runner import ModelRunner
    from breakgraph.runner.layer_stack import resolve_layer_stack

    tokenizer = load_tokenizer(args) if namespace.prompt else None
    if namespace.prompt and tokenizer is None:
        raise ValueError(
            "--prompt needs a tokenizer: leave out --skip-tokenizer-init, or give --tokens"
        )
    ids: list[list[int]] | None = None
    if tokenizer is not None:
        ids = PromptEncoder(tokenizer, len(tokenizer)).encode(namespace.prompt)
    lengths = [len(prompt) for prompt in ids] if ids else namespace.lengths or [namespace.tokens]
    runner = ModelRunner(one_bucket(args, lengths))
    if max(lengths) > runner.context_length:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens is longer than the model's context of "
            f"{runner.context_length}"
        )
    batch = make_batch(ids or random_ids(lengths, runner.vocab_size))
    if not runner.prefill_graph_runners:
        missing = resolve_layer_stack(runner.model)[1] or runner.dispatch(batch).why()
        raise ValueError(f"there is no graph to inspect: {missing}")
    return runner, batch


def one_bucket(args: ServerArgs, lengths: Sequence[int]) -> ServerArgs:
    """``args`` with graphs on, of the one bucket that their ladder has for the batch.

    Raises:
        ValueError: graphs are off, or there is no bucket; the reason names the flag.
    """
    from breakgraph.runner.buckets import decide

    if args.cuda_graph_backend_prefill == "disabled":
        raise ValueError(
            "--cuda-graph-backend-prefill disabled leaves no graph to inspect; leave it out"
        )
    if args.tp_size > 1:
        raise ValueError(
            f"inspect looks at a model on one device, not at {args.tp_size} ranks; leave out "
            "--tp-size"
        )
    on = replace(
        args,
        enable_breakable_cuda_graph=args.cuda_graph_backend_prefill != "full",
        disable_cuda_graph=True,
        cuda_graph_backend_decode=None,
        cuda_graph_bs=None,
    ).resolved()
    tokens, page = sum(lengths), args.page_size
    if len(lengths) > args.max_running_requests:
        raise ValueError(
            f"{len(lengths)} prompts are more than --max-running-requests "
            f"{args.max_running_requests}; raise it, or name fewer"
        )
    if tokens > (on.chunked_prefill_size or 0):
        raise ValueError(
            f"{tokens} tokens are more than one forward takes: --chunked-prefill-size is "
            f"{on.chunked_prefill_size}; raise it, and --max-total-tokens where that is given, or "
            "inspect fewer"
        )
    how = decide(tokens, on.piecewise_cuda_graph_tokens or (), args.max_prefill_padding)
    if how.bucket is None:
        raise ValueError(f"there is no graph to inspect: {how.describe()}")
    return replace(
        on,
        piecewise_cuda_graph_tokens=(how.bucket,),
        chunked_prefill_size=how.bucket,
        max_total_tokens=args.max_total_tokens or -(-how.bucket // page) * page,
        prefill_dispatch="always",
    )


def random_ids(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Token ids for each length, the same every time."""
    import numpy as np

    draw = np.random.default_rng(sum(lengths))
    return [draw.integers(0, vocab_size, length).tolist() for length in lengths]


def make_batch(ids: Sequence[Sequence[int]]) -> ForwardBatch:
    """New requests, stored one behind the other from slot 1 on."""
    import numpy as np

    from breakgraph.forward import ForwardBatch

    ends = np.cumsum([len(prompt) for prompt in ids]) + 1
    slots = [np.arange(end - len(prompt), end) for prompt, end in zip(ids, ends, strict=True)]
    return ForwardBatch.from_requests(ids, slots)


def report(seen: Inspection) -> str:
    """The summary, then the steps that hold the same as one row, for a terminal."""
    from breakgraph.inspection.advice import advise
    from breakgraph.inspection.figures import milliseconds, percent, step_rows
    from breakgraph.inspection.page import how_timed

    side = () if seen.on_cpu else ("host each",)
    rows = [("step", "count", *side, "each", "share", "nodes", "ops")]
    for row in step_rows(seen):
        own = () if seen.on_cpu else (milliseconds(row.host_us),)
        times = (*own, milliseconds(row.device_us), percent(row.share))
        rows.append((row.label, f"×{row.count}", *times, str(row.nodes or ""), row.ops))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)]
            + [row[-1]]
        ).rstrip()
        for row in rows
    ]
    head = f"{seen.model}: {seen.num_tokens} tokens in a bucket of {seen.bucket} ({seen.machine})"
    return "\n".join([head, "", *advise(seen), "", *lines, "", how_timed(seen)])


def _length(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def _lengths(text: str) -> list[int]:
    return [_length(part.strip()) for part in text.split(",")]
