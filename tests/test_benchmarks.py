"""The benchmark suite runs from its command to its plots, and within its time."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_startup,
    bench_wrapped,
    common,
    floors,
    peers,
    plots,
    report,
    sweep,
)
from benchmarks.suites import CPU, SUITES
from breakgraph.attention import Attention, TorchNativeBackend
from breakgraph.layers import Linear

ROOT = Path(__file__).parent.parent


def test_command_measures_a_shape_and_draws_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "cpu", "--only", "tiny-qwen3"]
    command += ["--seconds", "60", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "tiny-qwen3.json").read_text())
    assert "error" not in found
    sizes = [(row["batch_size"], row["tokens"]) for row in found["rows"]]
    one, *others = CPU.batch_sizes
    wanted = [(one, tokens) for tokens in (*CPU.tokens, *CPU.between)]
    assert sizes == wanted + [(size, tokens) for size in others for tokens in CPU.tokens]
    assert all(floor["products_and_mixer_ms"] > floor["products_ms"] for floor in found["floors"])
    assert [peer["tokens"] for peer in found["peers"]] == list(CPU.peer_tokens)
    assert [one["buckets"] for one in found["ladders"]] == [1, 4]
    text = (tmp_path / "report.md").read_text()
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert len(drawn) == 5
    for name in drawn:
        assert f"({name})" in text
        ElementTree.fromstring((tmp_path / name).read_text())


def test_every_shape_of_a_suite_has_a_configuration() -> None:
    names = {shape.name for suite in SUITES.values() for shape in suite.shapes}
    assert names <= set(common.shape_names())


@pytest.mark.parametrize("name", ["tiny-nemotron-h", "tiny-qwen3-moe"])
def test_time_that_is_over_leaves_rows_out_and_says_which(name: str) -> None:
    found: dict[str, Any] = {}
    saved: list[int] = []
    shape = next(shape for shape in CPU.shapes if shape.name == name)
    sweep.sweep(shape, CPU, time.time() - 1, False, found, lambda: saved.append(1))
    asked = len(CPU.tokens) * len(CPU.batch_sizes) + len(CPU.between)
    assert len(found["rows"]) + len(found["left_out"]) == asked
    assert found["left_out"]
    assert saved
    assert "No time for tokens × requests: " in "\n".join(report._section(found, Path()))


def test_products_are_those_of_every_weight() -> None:
    with common.model_runner("tiny-qwen3") as runner:
        assert floors.has_floor(runner.model)
        products = floors.matrix_products(runner.model, 16, 1)
        linears = [m for m in runner.model.get_layer_stack().modules() if isinstance(m, Linear)]
        assert len(products) == len(linears) + 1
        shapes = [tuple(product().shape) for product in products]
        assert shapes == [(16, len(m.weight)) for m in linears] + [(1, runner.vocab_size)]
        del runner


def test_a_floor_has_attention_where_it_belongs() -> None:
    class Backend(TorchNativeBackend):
        def forward(self, layer: Attention, *tensors: torch.Tensor) -> None:
            attended.append((layer, [tuple(tensor.shape) for tensor in tensors]))

    attended: list[tuple[Attention, list[tuple[int, ...]]]] = []
    with common.model_runner("tiny-qwen3") as runner:
        model = runner.model
        products = floors.matrix_products(model, 16, 1, Backend(torch.device("cpu")))
        for product in products:
            product()
        layers = [m for m in model.get_layer_stack().modules() if isinstance(m, Attention)]
        assert [layer for layer, _ in attended] == layers
        heads, kv_heads, dim = layers[0].num_heads, layers[0].num_kv_heads, layers[0].head_dim
        wanted = [(16, heads, dim), (16, kv_heads, dim), (16, kv_heads, dim), (16, heads, dim)]
        assert attended[0][1] == wanted
        del runner, layers, attended[:]


def test_a_kernel_that_waits_for_the_one_ahead_counts_from_its_end() -> None:
    def event(name: str, begin: float, end: float, device: str = "CUDA") -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end)
        kind = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(name=name, time_range=span, device_type=kind)

    events = [event("b", 4, 12), event("a", 0, 10), event("c", 15, 16), event("x", 0, 9, "CPU")]
    assert list(floors._kernels(events)) == [("a", 10), ("b", 2), ("c", 1)]


def test_experts_have_no_floor() -> None:
    with common.model_runner("tiny-qwen3-moe") as runner:
        assert not floors.has_floor(runner.model)
        del runner


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x64_64x6_2x1_v_bz_TNT", "matrix product"),
        ("void flash::flash_fwd_kernel<…>", "mixer"),
        ("extend", "mixer"),
        ("gated_product_tile", "matrix product"),
        ("qk_norm_rope_store", "norm"),
        ("silu_mul", "pointwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
    ],
)
def test_kernels_have_classes(name: str, kind: str) -> None:
    assert floors.kernel_class(name) == kind


def test_report_takes_whatever_modes_a_row_has(tmp_path: Path) -> None:
    row = {"tokens": 16, "batch_size": 1, "eager_ms": 8.0, "eager_event_ms": 7.9}
    row |= {"breakable_ms": 2.0, "breakable_bucket": 16, "full_ms": 1.0, "full_bucket": 16}
    row |= {"captured_ms": 4.0, "captured_bucket": 32, "auto_ms": 1.25}  # its graph of 16 is gone
    assert report.modes_of(row) == ["eager", "breakable", "full", "captured", "auto"]
    assert report.best_ms(row) == 1.0
    found = {"shape": "any", "machine": {"gpu": "none"}, "rows": [row], "left_out": []}
    found |= {"floors": [], "kernels": [], "peers": [], "captures": [], "ladders": []}
    found["error"] = "RuntimeError: out of something"
    (tmp_path / "any.json").write_text(json.dumps(found))
    report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 16 | 1 | 8.000 | 2.000 | 1.000 | 4.000 (32) | 1.250 | 8.00× |  |  |  |" in text
    assert "Cut short by an error: RuntimeError" in text


def test_plots_are_whole_where_there_is_little_to_plot() -> None:
    one = plots.lines("<one> point", "x", "y", [plots.Line("a", [(16, 3.0)])])
    for svg in (
        one,
        plots.lines("none", "x", "y", []),
        plots.heat_map("slower", ["16"], {"1": [0.5], "8": [None]}, "x", "y"),
        plots.bars("bars", "x", "y", {"16": {"a & b": 1.0, "c": 0.0}}),
    ):
        ElementTree.fromstring(svg)
    assert "&lt;one&gt;" in one


def test_a_line_is_drawn_from_left_to_right_whatever_came_first() -> None:
    points = [(16, 1.0), (4096, 100.0), (100, 2.0)]
    drawn = [plots.lines("t", "x", "y", [plots.Line("a", p)]) for p in (points, sorted(points))]
    polylines = [re.findall('<polyline points="([^"]+)"', svg) for svg in drawn]
    assert polylines[0] == polylines[1]


def test_an_axis_of_logarithms_ends_where_it_should() -> None:
    svg = plots.lines("t", "x", "y", [plots.Line("a", [(16, 1.0), (4096, 100.0)])])
    shown = [element.text for element in ElementTree.fromstring(svg) if element.text]
    assert {"1", "100", "16", "4096"} <= set(shown)
    assert plots._nice_below(0.3) == pytest.approx(0.2)
    assert plots._nice_above(0.3) == pytest.approx(0.5)
    assert math.isclose(plots._log_axis(1, 100, 0, 10)(10), 5)


def test_a_peer_gives_the_logits_of_the_last_token() -> None:
    model = peers.class_of_transformers("tiny-qwen3")
    with torch.no_grad():
        logits = peers.prefill_call(model, model, 5)()
    assert logits.shape == (1, 1, 512)


def test_an_engine_that_is_missing_is_said_to_be() -> None:
    assert any("not installed" in line for line in peers.engines())


def test_wrapped_native_and_eager_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_wrapped.decoder_rows("tiny-qwen3", (16, 32), 1, "breakable")
    assert [row["tokens"] for row in rows] == [16, 32]
    for row in rows:
        assert row["over_eager"] == row["sdpa_ms"] / row["wrapped_ms"]
        assert row["of_native"] == row["wrapped_ms"] / row["native_ms"]
    assert "goal" not in capsys.readouterr().out  # this shape has none


def test_packed_sentences_give_what_padded_ones_give() -> None:
    row = bench_wrapped.encoder_row("tiny-bert", 6, 1)
    assert row["largest_difference"] < 1e-5
    assert row["padded_tokens"] > row["tokens"]
    assert row["replays"]


def test_goals_are_judged_beside_the_figures() -> None:
    row = {"shape": "qwen3-0.6b", "tokens": 16, "wrapped_ms": 2.0, "native_ms": 1.9}
    row |= {"sdpa_ms": 5.0, "over_eager": 2.5, "of_native": 1.05}
    assert "goal at least 3× eager: missed" in bench_wrapped._decoder_line(row)
    row |= {"tokens": 2048}
    assert "goal within 1.25× of native: met" in bench_wrapped._decoder_line(row)


def test_phases_add_up_and_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bench_startup, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    phases = bench_startup.Phases()
    with phases.phase("outer"):
        now[0] += 2
        with phases.phase("inner"):
            now[0] += 3
        with phases.phase("inner"):
            now[0] += 1
        now[0] += 5
    assert phases.seconds == {"outer": 7, "inner": 4}


def test_a_start_is_broken_down() -> None:
    with common.model_folder("tiny-qwen3") as folder:
        found = bench_startup.run("tiny-qwen3", "dummy", 16, Path(folder))
    assert sum(found["phases"].values()) == pytest.approx(found["first_token_seconds"], rel=0.1)
    assert found["captured"]["prefill, breakable"]["buckets"] == 24
    assert {"import torch", "weights", "first token"} <= set(found["phases"])
