"""``breakgraph inspect``: the figures are the graph's, and the page is whole and readable."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from argparse import Namespace
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from breakgraph.cli import main
from breakgraph.graph import OpSpan, StepInfo, StepTrace, Trace
from breakgraph.inspection.advice import advise, break_share, idle_share
from breakgraph.inspection.command import one_bucket, prepare
from breakgraph.inspection.drawing import WIDTH, Block, Canvas, Scale, ticks
from breakgraph.inspection.figures import category, clean_name, op_rows, size, step_rows
from breakgraph.inspection.gather import STACK, Inspection, inspect_forward
from breakgraph.inspection.page import page
from breakgraph.inspection.png import BROWSERS
from breakgraph.server_args import ServerArgs

EXAMPLES = Path(__file__).parent.parent / "examples" / "arithmetic"
MODEL = ["--model-path", str(EXAMPLES / "qwen3"), "--device", "cpu"]
FULL = ["--cuda-graph-backend-prefill", "full"]
NO_FLAGS = {"tokens": None, "lengths": None, "prompt": None}
SVG = "{http://www.w3.org/2000/svg}"


def inspected(name: str, lengths: list[int], **flags: object) -> Inspection:
    args = ServerArgs(model_path=str(EXAMPLES / name), **{"device": "cpu"} | flags)
    runner, batch = prepare(args, Namespace(**NO_FLAGS | {"lengths": lengths}))
    return inspect_forward(runner, batch, repeats=2)


@pytest.fixture(scope="module")
def dense() -> Inspection:
    return inspected("qwen3", [7, 30])


@pytest.fixture(scope="module")
def hybrid() -> Inspection:
    return inspected("nemotron_h", [20])


def gpu_like(layers: int, launch: float, in_break: float, kernel: float) -> Inspection:
    """What a GPU would give, of made-up times: ``launch`` and ``in_break`` on the host, µs."""
    steps, infos, host, device = [], [], 0.0, 0.0
    for at in range(2 * layers + 1):
        kind = "break" if at % 2 else "segment"
        name = "Attention.mix" if at % 2 else f"segment {at // 2}"
        kernels = ("void flash<float, 4>(int)",) if at % 2 else ("gemm<1>", "gemm<1>", "_norm")
        start, host = host, host + (in_break if at % 2 else launch)
        device, ops = max(device, start + 5), []
        for each in kernels:
            ops.append(OpSpan(each, device, device + kernel))
            device += kernel
        steps.append(
            StepTrace(name=name, kind=kind, host_start_us=start, host_end_us=host, ops=tuple(ops))
        )
        nodes = () if at % 2 else kernels
        infos.append(StepInfo(name=name, kind=kind, nodes=len(nodes), op_names=nodes))
    replay = Trace(steps=tuple(steps), on_cpu=False, wall_us=max(host, device))
    stack = tuple(replace(s, name=STACK) if s.kind == "segment" else s for s in steps)
    return Inspection(
        model="<b>&'\"",
        architecture="A",
        machine="GPU",
        lengths=(100,) * 3,
        bucket=320,
        steps=tuple(infos),
        replay=replay,
        eager=replace(replay, steps=stack),
        capture_bytes=0,
        capture_seconds=0.0,
        forward_us=(1.0, 2.0),
        repeats=1,
        recurrent_breaks=(),
    )


def test_the_steps_are_those_of_the_graph():
    args = ServerArgs(model_path=str(EXAMPLES / "qwen3"), device="cpu")
    runner, batch = prepare(args, Namespace(**NO_FLAGS | {"tokens": 37}))
    assert runner.graph_runner is not None and runner.graph_runner.buckets == (48,)
    graph = runner.graph_runner.graphs[48]
    seen = inspect_forward(runner, batch, repeats=1)
    assert len(seen.steps) == len(seen.replay.steps) == len(graph.steps) == 13
    assert [step.name for step in seen.replay.steps] == [step.name for step in graph.steps]
    assert [len(s.ops) for s in seen.replay.steps] == [info.nodes for info in seen.steps]
    assert seen.pool_bytes == runner.graph_runner.memory_bytes == graph.pool().num_bytes
    assert seen.asked_bytes > 3 * seen.pool_bytes, "layers share the pool's memory"
    assert (seen.num_tokens, seen.bucket, seen.padding) == (37, 48, 11)


def test_an_inspected_forward_still_gives_what_it_gave():
    args = ServerArgs(model_path=str(EXAMPLES / "nemotron_h"), device="cpu")
    runner, batch = prepare(args, Namespace(**NO_FLAGS | {"lengths": [9, 5]}))
    before = runner.forward(batch).next_token_logits
    inspect_forward(runner, batch, repeats=1)
    after = runner.forward(batch).next_token_logits
    assert before is not None and after is not None and torch.equal(before, after)
    assert not any("mix" in vars(module) for module in runner.model.modules())


def test_eager_has_the_same_breaks_between_stretches_of_the_stack(dense: Inspection):
    names = [step.name for step in dense.eager.steps]
    assert names == [STACK] + ["Attention.mix", STACK] * 6
    ends = [t for step in dense.eager.steps for t in (step.host_start_us, step.host_end_us)]
    assert ends == sorted(ends) and ends[0] == 0
    assert dense.eager.end_us == pytest.approx(sum(s.host_us for s in dense.eager.steps), rel=0.01)


def test_a_hybrid_has_two_kinds_of_breaks(hybrid: Inspection):
    assert hybrid.break_names == ("RadixLinearAttention.mix", "Attention.mix")
    assert hybrid.recurrent_breaks == ("RadixLinearAttention.mix",)
    rows = {row.label: row for row in step_rows(hybrid)}
    assert (rows["RadixLinearAttention.mix"].count, rows["Attention.mix"].count) == (5, 2)
    eager = [step.name for step in hybrid.eager.steps if step.kind == "break"]
    assert eager == [step.name for step in hybrid.steps if step.kind == "break"]
    text = " ".join(advise(hybrid))
    assert re.search(r"7 breaks take .*: RadixLinearAttention.mix \d", text)


def test_captured_mixers_are_no_breaks():
    seen = inspected("nemotron_h", [20], linear_attention_capture=1)
    assert seen.break_names == ("Attention.mix",) and seen.recurrent_breaks == ()
    assert any("mamba2_scan" in row.name for row in op_rows(seen.replay))


def test_steps_alike_are_one_row_and_shares_sum_to_one(dense: Inspection):
    rows = step_rows(dense)
    labels = ["segment 0", "Attention.mix", "segments 1–5", "segment 6"]
    assert [row.label for row in rows] == labels
    assert [row.count for row in rows] == [1, 6, 5, 1]
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert sum(row.share for row in op_rows(dense.replay)) == pytest.approx(1)
    assert sum(row.nodes * row.count for row in rows) == sum(info.nodes for info in dense.steps)


def test_what_bounds_a_replay_is_said():
    idle = gpu_like(36, launch=2, in_break=100, kernel=3)
    assert idle_share(idle) > 0.8 and break_share(idle) > 0.9
    text = " ".join(advise(idle))
    assert "idles" in text and "--linear-attention-capture" not in text
    recurrent = " ".join(advise(replace(idle, recurrent_breaks=("Attention.mix",))))
    assert "--linear-attention-capture 3 would" in recurrent
    busy = gpu_like(36, launch=2, in_break=10, kernel=50)
    assert idle_share(busy) < 0.05
    text = " ".join(advise(busy))
    assert "kernels are the bound" in text and "the kernels before them hide it" in text
    assert "20 of 320 rows are padding" in text and "--piecewise-cuda-graph-tokens" in text


@pytest.mark.parametrize("kind", ["dense", "hybrid", "gpu"])
def test_the_page_is_whole_well_formed_and_fetches_nothing(
    kind: str, request: pytest.FixtureRequest
):
    seen = gpu_like(36, 2, 50, 4) if kind == "gpu" else request.getfixturevalue(kind)
    html = page(seen)
    root = ET.fromstring(html.partition("\n")[2])
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<script|<link|<img|url\(|@import|src=|href=", html)
    HTMLParser().feed(html)
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    for step in seen.steps:
        assert any(step.name in title for title in titles), step.name
    drawn = {rect.get("class") for rect in root.iter(f"{SVG}rect")}
    assert {"seg", "b0", "pad"} <= drawn and ("b1" in drawn) == (len(seen.break_names) > 1)
    rows = root.findall(".//details//tbody/tr")
    assert len(rows) == len(seen.steps)
    assert "prefers-color-scheme: dark" in html
    assert len(html) < 400_000
    for sentence in advise(seen):
        assert sentence in "".join(root.itertext())


def test_nothing_is_drawn_outside_its_picture(dense: Inspection):
    for seen in (dense, gpu_like(48, 2, 90, 3)):
        for svg in ET.fromstring(page(seen).partition("\n")[2]).iter(f"{SVG}svg"):
            _, _, width, height = map(float, (svg.get("viewBox") or "").split())
            for rect in svg.iter(f"{SVG}rect"):
                x, y, wide, high = (float(rect.get(k, 0)) for k in ("x", "y", "width", "height"))
                assert x >= 0 and x + wide <= width + 0.2, rect.attrib
                assert y >= 0 and y + high <= height, rect.attrib


def test_names_are_escaped():
    seen = gpu_like(2, 2, 5, 5)
    html = page(seen)
    assert "<b>&" not in html and "&lt;b&gt;&amp;" in html
    root = ET.fromstring(html.partition("\n")[2])
    assert "<b>&'\"" in "".join(root.find(".//h1").itertext())  # type: ignore[union-attr]


def test_lanes_are_to_scale_and_slivers_become_one():
    canvas, scale = Canvas("lanes"), Scale(100.0, left=100, right=1100)
    blocks = [Block(0, 50, "seg", "segment 0"), Block(50, 150, "b0")]
    blocks += [Block(110 + at, 111 + at, "c1") for at in range(5)]
    canvas.lane(0, 10, "lane", blocks, scale)
    rects = list(ET.fromstring(canvas.svg()).iter(f"{SVG}rect"))
    spans = [(float(r.get("x", 0)), float(r.get("width", 0))) for r in rects]
    assert spans == [(100, 1000), (100, 500), (600, 500)], "track, then blocks, cut at the end"
    fine = Canvas("slivers")
    fine.lane(0, 10, "", [Block(at / 100, (at + 1) / 100, "c1") for at in range(1000)], scale)
    assert fine.svg().count('class="c1"') in range(90, 120), "1000 slivers over 100 pixels"


@pytest.mark.parametrize("last", [0.003, 0.7, 9.9, 21.7, 128, 4096])
def test_ticks_are_round_few_and_within(last: float):
    found = ticks(last)
    assert found[0] == 0 and found[-1] <= last and 4 <= len(found) <= 12
    steps = {round(b - a, 9) for a, b in pairwise(found)}
    assert len(steps) == 1 and f"{steps.pop():e}"[0] in "125"


@pytest.mark.parametrize(
    ("name", "shown", "kind"),
    [
        ("aten.mm.default", "mm", "matrix product"),
        ("aten.addmm_.default", "addmm_", "matrix product"),
        ("breakgraph.rms_norm.default", "rms_norm", "norm"),
        ("nvjet_tst_128x64_64x8_h_bz_NNT", "nvjet_tst_128x64_64x8_h_bz_NNT", "matrix product"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "vectorized_elementwise_kernel<CUDAFunctor_add>",
            "pointwise",
        ),
        (
            "void pytorch_flash::flash_fwd_kernel<X<1>>(P)",
            "pytorch_flash::flash_fwd_kernel",
            "mixer",
        ),
        ("void (anonymous namespace)::copy_kernel<1>(int)", "copy_kernel", "copy"),
        ("aten.index_copy_.default", "index_copy_", "copy"),
    ],
)
def test_names_are_cleaned_and_sorted_into_kinds(name: str, shown: str, kind: str):
    assert clean_name(name, 60) == shown and category(name) == kind


def test_sizes_are_written_in_decimal_units():
    assert [size(n) for n in (0, 999, 1000, 1.5e6, 2.25e9)] == [
        *("0 B", "999 B", "1.0 kB", "1.5 MB", "2.25 GB")
    ]


def test_the_command_writes_the_page_and_prints_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "page.html"
    how = ["--prompt", "Tom has 3 apples.", "--prompt", "Ann", "--repeats", "1", "--html", str(out)]
    assert main(["inspect", *MODEL, *how, "--log-level", "warning"]) == 0
    said = capsys.readouterr().out
    assert "6 breaks take" in said and re.search(r"^segments 1–5 +×5 ", said, re.M)
    assert f"wrote {out}" in said and "2 requests" in out.read_text(encoding="utf-8")


def test_a_full_graph_is_one_segment(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", *MODEL, *FULL, "--tokens", "16", "--log-level", "warning"]) == 0
    assert "There is no break: the whole stack is one segment." in capsys.readouterr().out


def test_only_the_bucket_that_is_looked_at_is_captured():
    args = ServerArgs(model_path="m", device="cpu", cuda_graph_bs=(1, 2), page_size=16)
    one = one_bucket(args, [20, 30])
    assert one.piecewise_cuda_graph_tokens == (64,) and one.chunked_prefill_size == 64
    assert one.max_total_tokens == 64 and one.cuda_graph_backend_decode == "disabled"
    given = ServerArgs(model_path="m", device="cpu", piecewise_cuda_graph_tokens=(100, 200))
    assert one_bucket(given, [51]).piecewise_cuda_graph_tokens == (100,)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "600"], "600 tokens are more than .*--chunked-prefill-size is 512"),
        (["--lengths", "3,4,5", "--max-running-requests", "2"], "3 prompts .*--max-running"),
        (["--tokens", "40", "--piecewise-cuda-graph-tokens", "32"], "no graph .*bucket is 32"),
        (["--tokens", "17", "--max-prefill-padding", "1.1"], "no graph .*--max-prefill-padding"),
        (["--tokens", "5", "--cuda-graph-backend-prefill", "disabled"], "leave it out"),
        (
            [*FULL, "--lengths", "5,6,5", "--prefill-graph-requests", "2"],
            "no graph to inspect: 16 tokens .*raise --prefill-graph-requests$",
        ),
        (
            [*FULL, "--tokens", "16", "--cuda-graph-memory-budget", "1e-9"],
            "no graph to inspect: .*raise --cuda-graph-memory-budget$",
        ),
        (["--prompt", "a", "--skip-tokenizer-init"], "--prompt needs a tokenizer"),
        (["--tokens", "5", "--tp-size", "2"], "leave out --tp-size"),
        (["--tokens", "5", "--html", "no-such-folder/a.html"], "its folder does not exist"),
        (["--tokens", "5", "--html", str(EXAMPLES)], "it is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", *MODEL, *argv, "--log-level", "error"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match("breakgraph: error: .*" + message, err), err


def test_an_unknown_path_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "--model-path", "no-such", "--tokens", "4", "--device", "cpu"]) == 2
    assert "no-such is not a folder" in capsys.readouterr().err


def test_a_model_without_a_layer_stack_says_which_attribute_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    missing = "Odd has no get_layer_stack()"
    for module in ("breakgraph.runner.model_runner", "breakgraph.runner.layer_stack"):
        monkeypatch.setattr(f"{module}.resolve_layer_stack", lambda model: (None, missing))
    assert main(["inspect", *MODEL, "--tokens", "4", "--log-level", "error"]) == 2
    assert f"no graph to inspect: {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--tokens", "0"], ["--lengths", "3,x"], ["--tokens", "x"]])
def test_a_wrong_command_line_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["inspect", *MODEL, *argv])
    assert end.value.code == 2 and "breakgraph inspect: error" in capsys.readouterr().err


def test_reading_the_command_line_imports_no_torch():
    code = "import sys, breakgraph.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLES.parent.parent)


def test_a_png_without_a_browser_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("breakgraph.inspection.png.shutil.which", lambda name: None)
    out = tmp_path / "page.png"
    assert main(["inspect", *MODEL, "--tokens", "4", "--png", str(out)]) == 2
    assert "apt-get install chromium" in capsys.readouterr().err and not out.exists()


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")
def test_a_png_is_as_high_as_the_page(tmp_path: Path, dense: Inspection):
    from breakgraph.inspection.png import write_png

    write_png(page(dense), tmp_path / "page.png")
    head = (tmp_path / "page.png").read_bytes()[:24]
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    assert head[1:4] == b"PNG" and width >= WIDTH and 900 < height < 3000


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_timed_and_gaps_seen():
    seen = inspected("qwen3", [100], device="cuda")
    assert not seen.on_cpu and len(seen.steps) == 13
    for info, step in zip(seen.steps, seen.replay.steps, strict=True):
        assert step.ops, step.name
        assert info.kind == "break" or len(step.ops) == info.nodes
    assert 0 < idle_share(seen) < 1
    assert all(step.ops for step in seen.eager.steps if step.kind == "break")
    ET.fromstring(page(seen).partition("\n")[2])
