"""Whatever is captured, and however, 200 prompts are continued by the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from breakgraph import Engine
from breakgraph.runner import DispatchReason

EXAMPLE = Path(__file__).parents[1] / "examples" / "arithmetic"
PREFILL: dict[str, Any] = {
    "enable_breakable_cuda_graph": True,
    "piecewise_cuda_graph_tokens": (32, 64, 128, 256, 512),
    "prefill_dispatch": "always",
    "max_prefill_padding": 4.0,
}


def prompts() -> list[str]:
    """Questions with and without their beginning, some with half an answer: 20 to 400 tokens."""
    lines = (EXAMPLE / "test.jsonl").read_text().splitlines()[:200]
    mixed = []
    for i, line in enumerate(lines):
        problem = json.loads(line)
        text = f"Question: {problem['question']}\nAnswer:"
        if i % 4 == 1:
            text += " " + problem["answer"].split("\n")[0] + "\n"
        if i % 4 == 2 and mixed:
            text = f"Question: {problem['question']}\nAnswer: {problem['answer']}\n\n{mixed[-1]}"
        mixed.append(text)
    return mixed


def continue_all(**flags: Any) -> tuple[list[str], Engine]:
    engine = Engine(model_path=str(EXAMPLE / "qwen3"), device="cpu", **flags)
    return [result.text for result in engine.generate(prompts(), max_new_tokens=10)], engine


@pytest.fixture(scope="module")
def eager() -> list[str]:
    texts, engine = continue_all()
    assert engine.runner.decode_graph_runner is None and engine.runner.graph_runner is None
    assert len(texts) == 200 and len(set(texts)) > 100
    return texts


@pytest.mark.parametrize(
    "flags",
    [
        PREFILL,
        {"cuda_graph_backend_decode": "full"},
        {**PREFILL, "cuda_graph_backend_decode": "full"},
        {**PREFILL, "cuda_graph_backend_decode": "breakable", "cuda_graph_bs": (3, 64)},
        {**PREFILL, "cuda_graph_backend_decode": "full", "debug_cuda_graph": True},
    ],
    ids=["prefill", "decode", "both", "breakable decode", "debug"],
)
def test_the_text_does_not_depend_on_the_graphs(eager: list[str], flags: dict[str, Any]) -> None:
    texts, engine = continue_all(**flags)
    assert texts == eager
    if "cuda_graph_backend_decode" in flags:
        assert set(engine.runner.decode_dispatch_counts) == {DispatchReason.REPLAYED}
    if PREFILL.items() <= flags.items():
        assert engine.runner.dispatch_counts[DispatchReason.REPLAYED] > 0
