"""GSM8K's and MGSM's own prompts, both ways: token by token, whatever the small model answers.

``BREAKGRAPH_DATA`` names a folder with ``gsm8k/test.jsonl`` and ``mgsm/mgsm_XX.tsv``. Every prompt
of every file is asked: with ``-n 2`` on two CPU cores that is minutes, so it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from breakgraph import Engine
from breakgraph.engine import GenerateResult, SamplingParams
from breakgraph.evaluation.protocols import LANGUAGES, PROTOCOLS

MODEL = Path(__file__).parent.parent.parent / "examples" / "arithmetic" / "qwen3"
DATA = os.environ.get("BREAKGRAPH_DATA")
NEW_TOKENS = 32
GAP = {torch.float32: 1e-3, torch.bfloat16: 1.0}  # nats

pytestmark = pytest.mark.skipif(
    DATA is None, reason="BREAKGRAPH_DATA names no folder with gsm8k/ and mgsm/"
)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(
        model_path=str(MODEL),
        device=request.param,
        max_total_tokens=32768,
        max_running_requests=32,
        enable_breakable_cuda_graph=True,
        chunked_prefill_size=512,
        piecewise_cuda_graph_tokens=(64, 128, 256, 512),
        prefill_dispatch="always",
        max_prefill_padding=512.0,  # or the short end of a long prompt would run eagerly
    ) as engine:
        yield engine


def prompts(group: str) -> list[str]:
    task, _, language = group.partition("_")
    name = "test.jsonl" if task == "gsm8k" else f"mgsm_{language}.tsv"
    path = Path(DATA or "", task, name)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return [item.prompt for item in PROTOCOLS[task].items([path], None, 0)]


def prompt_gap(one: GenerateResult, other: GenerateResult) -> float:
    """How far the two ways are apart on a token of the prompt, in nats."""
    pairs = zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
    return max(abs(a - b) for a, b in pairs)


def parting_gap(one: GenerateResult, other: GenerateResult) -> float | None:
    """By how much a way preferred its own token where the two part; None where they never do."""
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        if a.token_id != b.token_id:
            none = float("-inf")
            first = a.logprob - dict(a.top).get(b.token_id, none)
            second = b.logprob - dict(b.top).get(a.token_id, none)
            return max(first, second)
    return None


@pytest.mark.parametrize(
    "engine", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.parametrize("group", ["gsm8k", *(f"mgsm_{language}" for language in LANGUAGES)])
def test_every_prompt_agrees(engine: Engine, group: str, record_property):
    texts = prompts(group)
    ids = [engine.tokenizer(text)["input_ids"] for text in texts]
    assert all(engine.tokenizer.decode(i) == text for i, text in zip(ids, texts, strict=True))
    assert max(map(len, ids)) + NEW_TOKENS <= engine.runner.context_length
    assert "replay" in engine.explain(ids)

    params = SamplingParams(
        max_new_tokens=NEW_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        logprobs=2,
        prompt_logprobs=True,
    )
    done, before = engine.statistics, (engine.statistics.replays, engine.statistics.prefills)
    graphs = engine.generate(ids, sampling_params=params)
    replays = done.replays - before[0]
    assert replays == done.prefills - before[1] > 0
    eager = engine.generate(ids, sampling_params=params, allow_graph=False)
    assert done.replays - before[0] == replays

    pairs = list(zip(graphs, eager, strict=True))
    apart = [prompt_gap(one, other) for one, other in pairs]
    parted = [gap for gap in (parting_gap(one, other) for one, other in pairs) if gap is not None]
    found = {
        "prompts": len(ids),
        "prompt_tokens": sum(map(len, ids)),
        "replays": replays,
        "largest_gap": max(apart),
        "parted": len(parted),
        "largest_parting": max(parted, default=0.0),
    }
    for name, value in found.items():
        record_property(name, value)
    print(group, found)
    assert all(len(one.token_ids) == len(other.token_ids) == NEW_TOKENS for one, other in pairs)
    assert max(apart) < GAP[engine.runner.dtype], found
    # Behind a tie the texts are others; more than rounding may not decide between two tokens.
    assert all(one < GAP[engine.runner.dtype] for one in parted), found
