"""GSM8K's and MGSM's own prompts, both ways: token by token, whatever the small model answers.

``BREAKGRAPH_DATA`` names a folder with ``gsm8k/test.jsonl`` and ``mgsm/mgsm_XX.tsv``. On the CPU a
sample of each file is prefilled, on a GPU every question.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from breakgraph import Engine
from breakgraph.engine import SamplingParams
from breakgraph.evaluation.protocols import LANGUAGES, PROTOCOLS

MODEL = Path(__file__).parent.parent.parent / "examples" / "arithmetic" / "qwen3"
DATA = os.environ.get("BREAKGRAPH_DATA")
SAMPLE = 4
NEW_TOKENS = 32
GAP = {torch.float32: 1e-3, torch.bfloat16: 1.0}  # nats, of a token of the prompt

pytestmark = pytest.mark.skipif(
    DATA is None, reason="BREAKGRAPH_DATA names no folder with gsm8k/ and mgsm/"
)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(
        model_path=str(MODEL),
        device=request.param,
        max_total_tokens=16384,
        max_running_requests=8,
        enable_breakable_cuda_graph=True,
        chunked_prefill_size=512,
        piecewise_cuda_graph_tokens=(64, 128, 256, 512),
        prefill_dispatch="always",
    ) as engine:
        yield engine


def prompts(group: str, count: int | None) -> list[str]:
    task, _, language = group.partition("_")
    name = "test.jsonl" if task == "gsm8k" else f"mgsm_{language}.tsv"
    path = Path(DATA or "", task, name)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    shots = 1 if task == "gsm8k" else 0
    return [item.prompt for item in PROTOCOLS[task].items([path], count, shots)]


def assert_both_ways_agree(engine: Engine, texts: list[str]) -> None:
    params = SamplingParams(
        max_new_tokens=NEW_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=True,
    )
    before = engine.statistics.replays
    graphs = engine.generate(texts, sampling_params=params)
    assert engine.statistics.replays > before
    eager = engine.generate(texts, sampling_params=params, allow_graph=False)
    gap = GAP[engine.runner.dtype]
    for one, other in zip(graphs, eager, strict=True):
        pairs = zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
        assert max(abs(a - b) for a, b in pairs) < gap
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < gap
            if a.token_id != b.token_id:
                assert engine.runner.dtype != torch.float32
                break  # behind a tie the texts are others


GROUPS = ["gsm8k", *(f"mgsm_{language}" for language in LANGUAGES)]


@pytest.mark.parametrize("engine", ["cpu"], indirect=True)
@pytest.mark.parametrize("group", GROUPS)
def test_a_sample_agrees_and_every_prompt_packs(engine: Engine, group: str):
    texts = prompts(group, None)
    room = engine.runner.context_length - NEW_TOKENS
    ids = [engine.tokenizer(text)["input_ids"] for text in texts]
    fitting = [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) <= room]
    assert len(fitting) > 0.9 * len(texts)
    assert all(engine.tokenizer.decode(i) == text for i, text in zip(ids, texts, strict=True))
    assert "replay" in engine.explain(fitting)
    assert_both_ways_agree(engine, fitting[:: len(fitting) // SAMPLE][:SAMPLE])


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["cuda"], indirect=True)
@pytest.mark.parametrize("group", GROUPS)
def test_every_question_agrees_on_a_gpu(engine: Engine, group: str):
    room = engine.runner.context_length - NEW_TOKENS
    texts = [t for t in prompts(group, None) if len(engine.tokenizer(t)["input_ids"]) <= room]
    assert_both_ways_agree(engine, texts)
