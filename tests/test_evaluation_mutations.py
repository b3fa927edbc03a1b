"""A broken break is caught: each way that attention could go wrong in replays alone fails the run.

The first test is the control: the same command without a mutation finds no difference.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from breakgraph.evaluation.command import main
from breakgraph.forward import ForwardBatch, get_forward_context
from breakgraph.runner.breakable_cuda_graph_runner import BreakableCudaGraphRunner

EXAMPLE = Path(__file__).parent.parent / "examples" / "arithmetic"
COMMAND = [
    *("gsm8k", "--model-path", str(EXAMPLE / "qwen3"), "--device", "cpu"),
    *("--data-path", str(EXAMPLE / "test.jsonl"), "--num-questions", "12", "--num-shots", "1"),
    *("--max-new-tokens", "96", "--compare", "eager", "--log-level", "warning"),
    *("--max-total-tokens", "4096", "--max-running-requests", "4"),
    *("--enable-breakable-cuda-graph", "--chunked-prefill-size", "256"),
    *("--piecewise-cuda-graph-tokens", "64", "128", "256"),
]
Mutate = Callable[[BreakableCudaGraphRunner, ForwardBatch, int], None]


def compare(tmp_path: Path) -> tuple[int, dict]:
    code = main([*COMMAND, "--output", str(tmp_path / "report.json")])
    return code, json.loads((tmp_path / "report.json").read_text())


def stale_lengths(runner: BreakableCudaGraphRunner, batch: ForwardBatch, bucket: int) -> None:
    """The plan made at capture: one request that fills the bucket."""
    runner.attn_backend.init_forward_metadata(runner.dummy(bucket))


def prefix_off_by_one(runner: BreakableCudaGraphRunner, batch: ForwardBatch, bucket: int) -> None:
    """Each cached prefix without its last token."""
    ends = batch.prefix_lens.cumsum()
    kept = [i for i in range(len(batch.prefix_slots)) if i + 1 not in ends]
    short = dataclasses.replace(
        batch,
        prefix_lens=(batch.prefix_lens - 1).clip(min=0),
        prefix_slots=batch.prefix_slots[kept],
    )
    runner.attn_backend.init_forward_metadata(short)


def swapped_requests(runner: BreakableCudaGraphRunner, batch: ForwardBatch, bucket: int) -> None:
    """The lengths of the batch in the wrong order."""
    other = dataclasses.replace(batch, extend_lens=batch.extend_lens[::-1].copy())
    runner.attn_backend.init_forward_metadata(other)


def test_without_a_mutation_there_is_no_difference(tmp_path: Path):
    code, report = compare(tmp_path)
    assert code == 0
    assert report["comparison"]["same_text"] == report["comparison"]["questions"] == 12
    assert report["comparison"]["disagreement"] < 1e-3
    assert report["runs"][0]["accuracy"] == report["runs"][1]["accuracy"] >= 0.9


@pytest.mark.parametrize("mutate", [stale_lengths, prefix_off_by_one, swapped_requests])
def test_a_wrong_plan_is_caught(
    mutate: Mutate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    replay = BreakableCudaGraphRunner.replay

    def mutated(self: BreakableCudaGraphRunner, batch: ForwardBatch, bucket: int) -> torch.Tensor:
        mutate(self, batch, bucket)
        return replay(self, batch, bucket)

    monkeypatch.setattr(BreakableCudaGraphRunner, "replay", mutated)
    code, report = compare(tmp_path)
    out = capsys.readouterr().out
    assert code == 1, out
    assert report["comparison"]["significant"] and "verdict: more than chance" in out


def test_a_dropped_last_token_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    replay = BreakableCudaGraphRunner.replay

    def mutated(self: BreakableCudaGraphRunner, batch: ForwardBatch, bucket: int) -> torch.Tensor:
        backend = self.attn_backend
        forward = backend.forward

        def without_last(layer, q, k, v, out) -> None:
            forward(layer, q, k, v, out)
            out[torch.from_numpy(get_forward_context().batch.last_token_rows)] = 0

        with monkeypatch.context() as patch:
            patch.setattr(backend, "forward", without_last)
            return replay(self, batch, bucket)

    monkeypatch.setattr(BreakableCudaGraphRunner, "replay", mutated)
    code, report = compare(tmp_path)
    assert code == 1, capsys.readouterr().out
    assert report["comparison"]["p_value"] < 0.05
