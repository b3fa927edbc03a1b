"""``breakgraph`` from a shell: what it prints, and how it ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from breakgraph.cli import main

EXAMPLE = Path(__file__).parent.parent / "examples" / "arithmetic"
SMALL = ["--device", "cpu", "--max-total-tokens", "1024"]
MODEL = ["--model-path", str(EXAMPLE / "qwen3"), *SMALL]
GRAPHS = [
    "--enable-breakable-cuda-graph",
    "--chunked-prefill-size=256",
    *("--piecewise-cuda-graph-tokens", "32", "64", "128", "256"),
]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("checkpoint", "steps"), [("qwen3", "7 segments, 6"), ("nemotron_h", "8 segments, 7")]
)
def test_questions_are_graded_and_compared_with_eager(
    checkpoint: str, steps: str, capsys: pytest.CaptureFixture[str]
):
    questions = [
        "--questions",
        str(EXAMPLE / "test.jsonl"),
        "--num-questions",
        "4",
        "--max-new-tokens=99",
    ]
    model = ["--model-path", str(EXAMPLE / checkpoint), *SMALL]
    code = main(["run", *model, *GRAPHS, *questions, "--compare-eager"])
    out, err = capsys.readouterr()
    assert code == 0, out
    assert re.search(r"^ready in .* s \(imports .*, weights .*, capture \d+\.\d\)$", err, re.M)
    assert re.search(
        r"^first token +\d+\.\d ms after the prompts, .* s after the start$", out, re.M
    )
    assert re.search(r"^accuracy: [34]/4 \((100|75)\.0 %\)$", out, re.M)
    assert "Question: A book has 188 pages." in out and "\n  right\n" in out
    assert re.search(r"^prefills replayed: 1 of 1$", out, re.M)
    assert re.search(r"^answers the same without graphs: 4 of 4$", out, re.M)
    assert re.search(r"^bucket hits +256 × 1$", out, re.M)
    assert re.search(rf"^graphs +4 buckets, {steps} breaks each$", out, re.M)
    for name in ("replayed", "eager"):
        assert re.search(rf"^prefill {name} +\d+\.\d ms in 1 forwards", out, re.M)


def test_prompts_are_continued_and_a_difference_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from breakgraph.engine import Engine

    generate = Engine.generate

    def other_when_eager(self, prompts, *args, allow_graph=True, **how):
        return generate(self, prompts if allow_graph else prompts[::-1], *args, **how)

    monkeypatch.setattr(Engine, "generate", other_when_eager)
    run = ["run", *MODEL, "--prompt", "Ann has 3", "--prompt", "Bob", "--max-new-tokens", "3"]
    assert main(run) == 0
    out = capsys.readouterr().out
    assert "Ann has 3" in out and re.search(r"^prompts +2$", out, re.M)
    assert re.search(r"^prefill forwards +1 graphs_disabled$", out, re.M)
    assert re.search(r"^bucket hits +none$", out, re.M)
    assert main([*run, "--compare-eager"]) == 1
    assert "answers the same without graphs: 0 of 2" in capsys.readouterr().out


def test_explain_says_how_lengths_would_run(capsys: pytest.CaptureFixture[str]):
    assert main(["explain", *MODEL, *GRAPHS, "--num-tokens", "60", "300"]) == 0
    out = capsys.readouterr().out
    assert "256" in out and "replay" in out


def test_help_explains_every_flag():
    out = subprocess.run(
        [sys.executable, "-m", "breakgraph", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=EXAMPLE.parent.parent,
    ).stdout
    entries = re.split(r"\n  (?=-)", out)[1:]
    assert len(entries) > 20 and any("--page-size" in entry for entry in entries)
    for entry in entries:
        flags, _, text = " ".join(entry.split("\n\n")[0].split("\n")).partition("  ")
        assert flags and len(text.split()) > 2, entry


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--prompt", "a"], "--model-path is required"),
        (
            ["run", "--model-path", "no-such-folder", "--prompt", "a"],
            "no-such-folder is not a folder",
        ),
        (["run", *MODEL, "--questions", "no-such.jsonl"], "no-such.jsonl: No such file"),
        (["run", *MODEL, "--questions", str(EXAMPLE)], "Is a directory"),
        (["run", *MODEL, "--prompt", ""], "prompt 0 is empty"),
        (["run", *MODEL, "--prompt", "a", "--num-questions", "2"], "without --questions"),
        (["run", *MODEL, "--prompt", "a", "--page-size", "0"], "--page-size"),
        (["run", *MODEL, "--prompt", "a", "--is-embedding"], "--is-embedding"),
        (["run", *MODEL, "--prompt", "a", "--tokenizer-path", "nope"], "--tokenizer-path"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys: pytest.CaptureFixture[str]):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert re.match("breakgraph: error: .*" + message, last_line(err)), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["run", *MODEL], "--prompt --questions"),
        (["run", *MODEL, "--prompt", "a", "--questions", "b"], "not allowed with"),
        (["run", *MODEL, "--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
        (["run", *MODEL, "--prompt", "a", "--page-sise", "2"], "did you mean --page-size"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(argv, message, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert message in last_line(capsys.readouterr().err)
