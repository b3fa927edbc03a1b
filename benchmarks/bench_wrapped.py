"""A class of transformers by itself, the same class wrapped and replayed, and our own file.

Decoders: one request, host token ids in, last-token logits on the device. The class runs eagerly
and keeps no keys and values, which is less than the others do; the wrapped one runs over its very
weights. Encoder: sentences of mixed lengths, lists of token ids in, normalised means on the host,
one call a side: the class pads them to the longest, ours packs them. All sides take turns, so that
drift meets them alike.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import breakgraph
from benchmarks.common import (
    machine,
    median,
    model_runner,
    prefill_request,
    shape_names,
    timed,
    write_json,
)
from benchmarks.peers import class_of_transformers, prefill_call
from breakgraph.forward import ForwardBatch
from breakgraph.models.transformers_impl import wrap_model
from breakgraph.runner import ModelRunner

Row = dict[str, Any]
Call = Callable[[], object]

TOKENS = (16, 64, 128, 512, 1024, 2048, 4096)
SMALL, SMALL_TOKENS, SMALL_GOAL = "qwen3-0.6b", 512, 3.0
NATIVE_TOKENS, NATIVE_GOAL = 2048, 1.25
ENCODER_GOAL = 2.0
LENGTHS = (8, 64)
"""Tokens of the shortest and of the longest sentence, about those of GSM8K's; drawn uniformly."""


def decoder_rows(
    shape: str, token_counts: Sequence[int], repeats: int, backend: str, compiled: bool = False
) -> list[Row]:
    """Milliseconds of the class eager, wrapped and native at each token count.

    With ``compiled``, the wrapped one has its token-wise parts compiled.
    """
    model = class_of_transformers(shape)
    flags = {
        "cuda_graph_backend_prefill": backend,
        "piecewise_cuda_graph_tokens": tuple(token_counts),
        "chunked_prefill_size": max(token_counts),
        "max_total_tokens": max(token_counts),
        "prefill_dispatch": "always",
    }
    rows = []
    with (
        model_runner(
            shape, model=wrap_model(model), enable_torch_compile=compiled, **flags
        ) as wrapped,
        model_runner(shape, model_impl="native", **flags) as native,
    ):
        for tokens in token_counts:
            calls: dict[str, Call] = {
                "wrapped": _replayed(wrapped, tokens),
                "native": _replayed(native, tokens),
            }
            times = turns(model, prefill_call(model, model, tokens), calls, repeats)
            row: Row = {"shape": shape, "tokens": tokens} | times
            row["over_eager"] = _fastest_eager(times) / times["wrapped_ms"]
            row["of_native"] = times["wrapped_ms"] / times["native_ms"]
            rows.append(row)
            print(_decoder_line(row), flush=True)
        del wrapped, native
    return rows


def _replayed(runner: ModelRunner, tokens: int) -> Call:
    request = prefill_request(runner.vocab_size, tokens, 1)
    dispatch = runner.dispatch(ForwardBatch.from_requests(*request))
    if dispatch.bucket != tokens:
        raise SystemExit(f"{tokens} tokens would not be replayed: {dispatch.describe()}")
    return lambda: runner.forward(ForwardBatch.from_requests(*request))


def turns(model: Any, eager: Call, calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, by turns; ``eager`` once for each attention there is."""
    names = [*attention_names(), *calls]
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for repeat in range(repeats + 3):
            for name in names:
                if name not in calls:
                    model.set_attn_implementation(name)
                taken = timed(calls.get(name, eager))[0]
                if repeat >= 3:
                    times[name].append(taken)
    return {f"{name}_ms": median(taken) for name, taken in times.items()}


def attention_names() -> list[str]:
    """The attention implementations of transformers that can be had here."""
    from transformers import utils

    found = ["sdpa"]
    for version in (2, 3):
        available = getattr(utils, f"is_flash_attn_{version}_available", None)
        if torch.cuda.is_available() and available is not None and available():
            found.append(f"flash_attention_{version}")
    return found


def _fastest_eager(times: dict[str, float]) -> float:
    return min(times[f"{name}_ms"] for name in attention_names())


def encoder_row(shape: str, sentences: int, repeats: int) -> Row:
    """One call over ``sentences``: the class padded, and the class wrapped and packed."""
    model = class_of_transformers(shape)
    random = np.random.default_rng(0)
    lengths = random.integers(LENGTHS[0], LENGTHS[1] + 1, sentences)
    texts = [random.integers(1, model.config.vocab_size, int(n)).tolist() for n in lengths]
    # Memory of its own for the cache, which an encoder does not use beyond one forward.
    most = sentences * LENGTHS[1]
    with breakgraph.wrap(
        model,
        is_embedding=True,
        pooling="mean",
        max_running_requests=sentences,
        chunked_prefill_size=most,
        max_total_tokens=most,
        cuda_graph_backend_prefill="auto",
        prefill_graph_requests=sentences,
    ) as engine:
        runner = engine.runner
        ours, theirs = engine.embed(texts), padded_means(model, texts)
        error = float((ours - theirs).abs().max())
        times = turns(
            model,
            lambda: padded_means(model, texts),
            {"packed": lambda: engine.embed(texts)},
            repeats,
        )
        replays = sum(runner.bucket_hits.values())
    row: Row = {
        "shape": shape,
        "sentences": sentences,
        "tokens": int(lengths.sum()),
        "padded_tokens": int(sentences * lengths.max()),
        "largest_difference": error,
        "replays": replays,
    } | times
    row["over_eager"] = _fastest_eager(times) / times["packed_ms"]
    return row


@torch.no_grad()
def padded_means(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Normalised means ``[texts, hidden_size]`` on the host, by one padded forward."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate([np.asarray(text, np.int64) for text in texts])
    on_device = torch.from_numpy(mask).to(model.device)
    output = model(input_ids=torch.from_numpy(ids).to(model.device), attention_mask=on_device)
    weights = on_device.unsqueeze(-1).float()
    means = (output[0].float() * weights).sum(1) / weights.sum(1)
    return F.normalize(means, dim=-1).cpu()


def _decoder_line(row: Row) -> str:
    times = "  ".join(
        f"{key.removesuffix('_ms')} {value:.3f}" for key, value in row.items() if key[-3:] == "_ms"
    )
    goals = []
    if row["shape"] == SMALL and row["tokens"] <= SMALL_TOKENS:
        goals.append(_goal(f"at least {SMALL_GOAL:g}× eager", row["over_eager"] >= SMALL_GOAL))
    if row["tokens"] == NATIVE_TOKENS:
        goals.append(_goal(f"within {NATIVE_GOAL:g}× of native", row["of_native"] <= NATIVE_GOAL))
    said = f"; {', '.join(goals)}" if goals else ""
    return (
        f"{row['shape']} {row['tokens']:6d} tokens: {times} ms; {row['over_eager']:.2f}× eager, "
        f"{row['of_native']:.2f}× native's time{said}"
    )


def _encoder_line(row: Row) -> str:
    times = "  ".join(
        f"{key.removesuffix('_ms')} {value:.3f}" for key, value in row.items() if key[-3:] == "_ms"
    )
    return (
        f"{row['shape']}, {row['sentences']} sentences, {row['tokens']} tokens, "
        f"{row['padded_tokens']} padded: {times} ms; {row['over_eager']:.2f}× eager; "
        f"{_goal(f'at least {ENCODER_GOAL:g}×', row['over_eager'] >= ENCODER_GOAL)}; vectors "
        f"differ by {row['largest_difference']:.1e} at most"
    )


def _goal(text: str, met: bool) -> str:
    return f"goal {text}: {'met' if met else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=shape_names(), default=[SMALL, "llama-8b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--encoder", choices=shape_names(), default="bert-base")
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=11, help="timed calls a side")
    parser.add_argument("--backend", default="breakable", help="--cuda-graph-backend-prefill")
    parser.add_argument("--enable-torch-compile", action="store_true", help="for the wrapped side")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    print(f"{machine()}; attention of the class: {', '.join(attention_names())}")
    found: dict[str, Any] = {"repeats": args.repeats, "rows": []}
    found["encoder"] = encoder_row(args.encoder, args.sentences, args.repeats)
    print(_encoder_line(found["encoder"]), flush=True)
    write_json(args.output, found)
    for shape in args.shapes:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found["rows"] += decoder_rows(
            *(shape, sorted(args.tokens), args.repeats, args.backend, args.enable_torch_compile)
        )
        write_json(args.output, found)


if __name__ == "__main__":
    main()
