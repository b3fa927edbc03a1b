"""The same prefills by others, in the same process: transformers eager and compiled.

Its model has random weights, takes host token ids and gives the last token's logits. It keeps no
keys and values, which is less than what a prefill here does. As a command it is measured alone,
compiled too, beside our own fastest graph in the same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    machine,
    median,
    model_folder,
    model_runner,
    prefill_request,
    shape_names,
    timed,
    write_json,
)
from breakgraph.forward import ForwardBatch

COMPILE_MODES = ("default", "reduce-overhead")
ENGINES = ("sglang", "vllm")
WARM_UP, REPEATS = 2, 6


def engines() -> list[str]:
    """A line for each other engine: none of them is run from here."""
    return [
        f"{name}: installed; measure it by its own benchmark"
        if importlib.util.find_spec(name)
        else f"{name}: not installed"
        for name in ENGINES
    ]


def class_of_transformers(shape: str, attention: str = "sdpa", model_class: str = "") -> Any:
    """The class that the shape's ``config.json`` names, or ``model_class``, on the device of the
    benchmarks, in half precision on a GPU; weights are random."""
    import transformers

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    with model_folder(shape) as folder:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            model = getattr(transformers, model_class or named)._from_config(
                config, attn_implementation=attention
            )
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval().requires_grad_(False)


def prefill_call(model: Any, call: Callable[..., Any], tokens: int) -> Callable[[], Any]:
    """A prefill of one request through ``call``: ids on the host to logits on the device."""
    vocab = model.config.get_text_config().vocab_size
    ids = [np.random.default_rng(tokens).integers(0, vocab, tokens).tolist()]
    device = model.device

    def prefill() -> Any:
        return call(
            input_ids=torch.tensor(ids, device=device), use_cache=False, logits_to_keep=1
        ).logits

    return prefill


@torch.no_grad()
def eager(shape: str, token_counts: Sequence[int], deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each token count until ``deadline``, by ``time.time()``."""
    model = class_of_transformers(shape)
    for tokens in token_counts:
        if time.time() > deadline:
            break
        yield _row("eager", tokens, prefill_call(model, model, tokens))


@torch.no_grad()
def compiled(shape: str, token_counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows under torch.compile, each token count compiled for itself: the first and the middle.

    Compiling takes a minute a row for a large model, so the time budget does not bind it.
    """
    model = class_of_transformers(shape)
    for mode in COMPILE_MODES:
        for tokens in sorted({token_counts[0], token_counts[len(token_counts) // 2]}):
            torch.compiler.reset()
            call = torch.compile(model, mode=mode, dynamic=False)

            def step(call: Callable[..., Any] = call, tokens: int = tokens) -> Any:
                torch.compiler.cudagraph_mark_step_begin()
                return prefill_call(model, call, tokens)()

            began = time.perf_counter()
            try:
                step()
            except Exception as error:  # whatever a compiler raises
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                yield {"peer": "transformers", "mode": mode, "tokens": tokens, "error": reason}
                continue
            seconds = time.perf_counter() - began
            yield _row(f"compiled, {mode}", tokens, step) | {"compile_seconds": seconds}
    torch.compiler.reset()


def _row(mode: str, tokens: int, call: Callable[[], Any]) -> dict[str, Any]:
    times = [timed(call)[0] for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    row = {"peer": "transformers", "mode": mode, "tokens": tokens, "ms": median(times)}
    print(f"{tokens:6d} tokens by transformers, {mode}: {row['ms']:.3f} ms", flush=True)
    return row


def ours(shape: str, token_counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row of our own for each token count, by ``--cuda-graph-backend-prefill auto``."""
    flags = {
        "piecewise_cuda_graph_tokens": tuple(token_counts),
        "chunked_prefill_size": max(token_counts),
        "max_total_tokens": max(token_counts),
    }
    with model_runner(shape, cuda_graph_backend_prefill="auto", **flags) as runner:
        for tokens in token_counts:
            request = prefill_request(runner.vocab_size, tokens, 1)

            def prefill(forward: Any = runner.forward, request: Any = request) -> Any:
                return forward(ForwardBatch.from_requests(*request))

            times = [timed(prefill)[0] for _ in range(WARM_UP + 3 * REPEATS)][WARM_UP:]
            yield {"peer": "breakgraph", "mode": "auto", "tokens": tokens, "ms": median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int, nargs="+", default=(16, 512))
    parser.add_argument("--output", help="JSON file to write, anew after each row")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{args.shape} on {machine()}")
    for side in (
        ours(args.shape, args.tokens),
        eager(args.shape, args.tokens, float("inf")),
        compiled(args.shape, args.tokens),
    ):
        for row in side:
            rows.append(row)
            if row["peer"] == "breakgraph":  # the others print theirs
                print(
                    f"{row['tokens']:6d} tokens here, {row['mode']}: {row['ms']:.3f} ms", flush=True
                )
            write_json(args.output, {"shape": args.shape, "rows": rows})


if __name__ == "__main__":
    main()
