"""Accuracy through the server, with graphs and beside it without, of the bundled checkpoints.

On a CPU some questions, in float32, where both ways must give the same texts. On a GPU all of them,
in bfloat16, where rounding may choose between two tokens that are almost as likely.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from server.support import PROBLEMS, Running, running

from breakgraph.evaluation.command import main
from breakgraph.evaluation.comparison import MAX_GAP
from breakgraph.evaluation.protocols import LANGUAGES

FLAGS: dict[str, Any] = {
    "max_total_tokens": 8192,
    "max_running_requests": 16,
    "chunked_prefill_size": 256,
    "piecewise_cuda_graph_tokens": (32, 64, 128, 256),
    "prefill_dispatch": "always",
}


@dataclass(frozen=True)
class Setup:
    """Which checkpoint answers where, and how many questions of each file; None is all."""

    checkpoint: str
    device: str
    dtype: str
    english: int | None = None
    each_language: int | None = None

    @property
    def model(self) -> Path:
        return PROBLEMS.parent / self.checkpoint


# A prefill of the hybrid takes a CPU longer, so it is asked less.
SETUPS = [
    pytest.param(Setup("qwen3", "cpu", "float32", 40, 20), id="qwen3"),
    pytest.param(Setup("nemotron_h", "cpu", "float32", 16, 8), id="nemotron_h"),
    *(
        pytest.param(Setup(name, "cuda", "bfloat16"), marks=pytest.mark.gpu, id=f"{name}-cuda")
        for name in ("qwen3", "nemotron_h")
    ),
]


@dataclass
class Served:
    """The same checkpoint twice."""

    setup: Setup
    graphs: Running
    eager: Running


@pytest.fixture(scope="module", params=SETUPS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    setup: Setup = request.param
    flags = FLAGS | {"model_path": str(setup.model), "device": setup.device, "dtype": setup.dtype}
    with ExitStack() as stack:
        graphs = stack.enter_context(running(**flags))
        eager = stack.enter_context(running(**flags | {"enable_breakable_cuda_graph": False}))
        yield Served(setup, graphs, eager)


def evaluate(served: Served, report: Path, *argv: str) -> dict[str, Any]:
    """The report of a comparison that found no difference."""
    gap = MAX_GAP[served.setup.dtype]
    urls = ["--base-url", served.graphs.url, "--eager-url", served.eager.url]
    how = ["--compare", "eager", "--num-threads", "16", "--max-gap", str(gap)]
    code = main([*argv, *urls, *how, "--output", str(report)])
    read = json.loads(report.read_text())
    comparison = read["comparison"]
    assert code == 0 and not comparison["significant"], comparison
    assert comparison["disagreement"] < gap
    if served.setup.dtype == "float32":
        assert comparison["only_first"] == comparison["only_second"] == 0
        assert comparison["same_text"] == comparison["questions"]
    ways = [[q[way]["prefill"]["bucket"] for q in read["questions"]] for way in ("graphs", "eager")]
    assert all(bucket in FLAGS["piecewise_cuda_graph_tokens"] for bucket in ways[0])
    assert ways[1] == [None] * len(ways[1])
    return read


def first(count: int | None) -> list[str]:
    return [] if count is None else ["--num-questions", str(count)]


@pytest.mark.parametrize("shots", [0, 3])
def test_gsm8k(served: Served, tmp_path: Path, shots: int):
    count = served.setup.english
    how = [*first(count), "--num-shots", str(shots), "--max-new-tokens", "128"]
    report = evaluate(served, tmp_path / "r.json", "gsm8k", "--data-path", str(PROBLEMS), *how)
    assert report["protocol"] == "sglang-gsm8k-v1"
    assert report["questions"][0]["index"] == shots
    for run in report["runs"]:
        assert run["accuracy"] >= 0.9 and run["questions"] == (count or 200 - shots)


def test_mgsm(served: Served, tmp_path: Path):
    files = [str(path) for path in sorted(PROBLEMS.parent.glob("mgsm_*.tsv"))]
    if not files:
        pytest.skip("no mgsm-format questions lie beside the bundled checkpoint")
    how = [*first(served.setup.each_language), "--max-new-tokens", "160"]
    report = evaluate(served, tmp_path / "r.json", "mgsm", "--data-path", *files, *how)
    assert report["protocol"] == "simple-evals-mgsm-v1"
    trained = json.loads((served.setup.model / "training.json").read_text())["held_out_accuracy"]
    for run in report["runs"]:
        languages = {group.removeprefix("mgsm_"): share for group, share in run["groups"].items()}
        assert trained.keys() <= languages.keys()
        for language in trained:
            least = 0.9 if language == "en" else 0.8
            assert languages[language]["accuracy"] >= least, language


def test_the_checkpoints_were_trained_on_the_protocols_instructions():
    for file in (PROBLEMS.parent / "languages").glob("*.json"):
        words, language = json.loads(file.read_text()), LANGUAGES[file.stem]
        if "mgsm_instruction" in words:
            assert words["mgsm_instruction"] == language.instruction
            assert words["mgsm_answer"].startswith(language.answer_word)
