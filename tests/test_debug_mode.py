"""--debug-cuda-graph: each forward is one break of its graph, and its Python runs every time."""

from __future__ import annotations

import pdb
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_support import Decoder, assert_close, make_runner
from models_support import make_reference, random_prompts, save_checkpoint

from breakgraph.forward import LayerInputs
from breakgraph.graph import eager_on_graph, is_in_breakable_cuda_graph
from breakgraph.models.dense import DenseLayer, DenseStack
from breakgraph.runner import DispatchReason, GraphCaptureError, ModelRunner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_reference("Qwen3ForCausalLM", head_dim=16)
    return save_checkpoint(model, tmp_path_factory.mktemp("qwen3"))


def patch_layer(monkeypatch: pytest.MonkeyPatch, look: Any) -> None:
    """Call ``look(hidden)`` before each layer."""
    original = DenseLayer.forward

    def forward(self: DenseLayer, residual: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        look(residual)
        return original(self, residual, *rest)

    monkeypatch.setattr(DenseLayer, "forward", forward)


def runs(runner: ModelRunner, **how: Any) -> list[torch.Tensor | None]:
    """The logits of two prefills and three decodes."""
    decoder = Decoder(runner)
    prefills = [decoder.prefill(prompt, **how) for prompt in random_prompts([20, 7])]
    results = [result for _, result in prefills]
    rows = [row for row, _ in prefills]
    for batch in ([rows[0]], rows, rows):
        results.append(runner.forward(decoder.batch(batch, [3] * len(batch)), **how))
    wanted = DispatchReason.EAGER_ASKED if how else DispatchReason.REPLAYED
    assert [result.dispatch.reason for result in results] == [wanted] * 5
    for row in rows:
        decoder.release(row)
    return [result.next_token_logits for result in results]


@pytest.mark.parametrize("device", DEVICES)
def test_debug_mode_gives_what_eager_gives_and_runs_python_each_time(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    sums: list[float] = []

    def look(hidden: torch.Tensor) -> None:
        sums.append(hidden.sum().item())
        print("hidden", hidden[0, :2], is_in_breakable_cuda_graph())
        if hidden.abs().max() > 1e9:
            raise AssertionError("a branch on data")

    patch_layer(monkeypatch, look)
    with pytest.raises(GraphCaptureError):
        make_runner(checkpoint, device)
    runner = make_runner(checkpoint, device, debug_cuda_graph=True)
    assert runner.graph_runner is not None and runner.decode_graph_runner is not None
    for graphs in (runner.graph_runner, runner.decode_graph_runner):
        assert {(g.num_segments, g.num_breaks) for g in graphs.graphs.values()} == {(1, 1)}
    assert caplog.text.count("--debug-cuda-graph") == 2 and "slower" in caplog.text
    eager = runs(runner, allow_graph=False)
    sums.clear()
    capsys.readouterr()
    for got, expected in zip(runs(runner), eager, strict=True):
        assert_close(got, expected)
    assert len(sums) == 2 * 5
    said = capsys.readouterr().out
    assert said.count("hidden") == 10 and said.count("True") == 10


def test_breakpoint_stops_in_a_replay(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[str] = []
    wanted = False
    patch_layer(monkeypatch, lambda hidden: breakpoint() if wanted else None)
    runner = make_runner(checkpoint, "cpu", debug_cuda_graph=True)
    monkeypatch.setenv("PYTHONBREAKPOINT", "pdb.set_trace")
    monkeypatch.setattr(pdb, "set_trace", lambda *args, **kwargs: stops.append("stopped"))
    wanted = True
    runs(runner)
    assert len(stops) == 2 * 5


@dataclass
class Output:
    hidden: torch.Tensor
    norms: dict[str, torch.Tensor]
    calls: int


def test_breaks_inside_run_plainly_and_a_structured_output_comes_back_whole(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    @eager_on_graph()
    def inner(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return hidden.norm(dim=-1)

    original = DenseStack.forward

    def forward(self: DenseStack, inputs: LayerInputs) -> Output:
        hidden = original(self, inputs)
        return Output(hidden, {"last": inner(hidden)}, len(calls))

    monkeypatch.setattr(DenseStack, "forward", forward)
    with pytest.raises(GraphCaptureError, match="gave a Output"):
        make_runner(checkpoint, "cpu")
    runner = make_runner(checkpoint, "cpu", debug_cuda_graph=True)
    decoder = Decoder(runner)
    graphs = runner.decode_graph_runner
    assert graphs is not None and graphs.graphs[4].num_breaks == 1
    table = runner.requests
    rows = [table.acquire() for _ in range(3)]
    for row in rows:
        decoder.ids[row] = []
    outputs = []
    for token in (5, 6):
        batch = decoder.batch(rows, [token] * 3)
        graphs.replay_prepare(batch, 4)
        output: Any = graphs.replay(batch, 4)
        assert isinstance(output, Output) and output.calls == len(calls)
        assert output.hidden.shape == (4, 32)
        torch.testing.assert_close(output.norms["last"], output.hidden.norm(dim=-1))
        outputs.append(output.hidden.clone())
    assert not torch.allclose(outputs[0], outputs[1])
