"""Accuracy through the server, with graphs and beside it without, of the bundled checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.support import MODEL, PROBLEMS, Running, running

from breakgraph.evaluation.command import main
from breakgraph.evaluation.protocols import LANGUAGES

TRAINED = json.loads((MODEL / "training.json").read_text()).get("held_out_accuracy", {})
FLAGS: dict[str, Any] = {
    "max_total_tokens": 8192,
    "max_running_requests": 16,
    "chunked_prefill_size": 256,
    "piecewise_cuda_graph_tokens": (32, 64, 128, 256),
    "prefill_dispatch": "always",
}


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Running, Running]]:
    with running(**FLAGS) as graphs, running(**FLAGS | {"enable_breakable_cuda_graph": False}) as e:
        yield graphs, e


def evaluate(servers: tuple[Running, Running], report: Path, *argv: str) -> dict[str, Any]:
    """The report of a comparison that found no difference."""
    graphs, eager = servers
    urls = ["--base-url", graphs.url, "--eager-url", eager.url, "--compare", "eager"]
    code = main([*argv, *urls, "--num-threads", "16", "--max-gap", "0.01", "--output", str(report)])
    read = json.loads(report.read_text())
    comparison = read["comparison"]
    assert code == 0, comparison
    assert comparison["only_first"] == comparison["only_second"] == 0
    assert comparison["same_text"] == comparison["questions"]
    assert comparison["disagreement"] < 0.01
    ways = [[q[way]["prefill"]["bucket"] for q in read["questions"]] for way in ("graphs", "eager")]
    assert all(bucket in FLAGS["piecewise_cuda_graph_tokens"] for bucket in ways[0])
    assert ways[1] == [None] * len(ways[1])
    return read


@pytest.mark.parametrize("shots", [0, 3])
def test_gsm8k(servers: tuple[Running, Running], tmp_path: Path, shots: int):
    how = ["--num-questions", "40", "--num-shots", str(shots), "--max-new-tokens", "128"]
    report = evaluate(servers, tmp_path / "r.json", "gsm8k", "--data-path", str(PROBLEMS), *how)
    assert report["protocol"] == "sglang-gsm8k-v1"
    assert report["questions"][0]["index"] == shots
    for run in report["runs"]:
        assert run["accuracy"] >= 0.9 and run["questions"] == 40


def test_mgsm(servers: tuple[Running, Running], tmp_path: Path):
    files = [str(path) for path in sorted(PROBLEMS.parent.glob("mgsm_*.tsv"))]
    if not files:
        pytest.skip("no mgsm-format questions lie beside the bundled checkpoint")
    how = ["--num-questions", "20", "--max-new-tokens", "160"]
    report = evaluate(servers, tmp_path / "r.json", "mgsm", "--data-path", *files, *how)
    assert report["protocol"] == "simple-evals-mgsm-v1"
    for run in report["runs"]:
        for group, share in run["groups"].items():
            language = group.removeprefix("mgsm_")
            if language in TRAINED:
                assert share["accuracy"] >= (0.9 if language == "en" else 0.8), group


def test_the_checkpoint_was_trained_on_the_protocols_instructions():
    for file in (PROBLEMS.parent / "languages").glob("*.json"):
        words, language = json.loads(file.read_text()), LANGUAGES[file.stem]
        if "mgsm_instruction" in words:
            assert words["mgsm_instruction"] == language.instruction
            assert words["mgsm_answer"].startswith(language.answer_word)
