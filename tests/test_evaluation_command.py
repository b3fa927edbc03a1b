"""The command line, against a server of a few lines: what it asks, reports and refuses."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from breakgraph.evaluation import answering, data
from breakgraph.evaluation.command import main

MODEL = Path(__file__).parent.parent / "examples" / "arithmetic" / "qwen3"


class Fake(ThreadingHTTPServer):
    """Answers every completion with ``text``; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.text, self.failures = " 1 + 1\n#### 2", [200]
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        failures = self.server.failures
        code = failures.pop(0) if len(failures) > 1 else failures[0]
        if code != 200:
            return self.reply(code, {"error": {"message": "too long"}})
        text = self.server.text
        choice: dict[str, Any] = {"text": text, "finish_reason": "stop"}
        if "messages" in body:
            choice = {"message": {"role": "assistant", "content": text}}
        self.reply(200, {"choices": [choice], "usage": {"completion_tokens": 7}})

    def reply(self, code: int, body: dict[str, Any]) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(answering.time, "sleep", lambda seconds: None)
    with Fake() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    file = tmp_path / "test.jsonl"
    lines = [{"question": f"Q{i}?", "answer": f"#### {2 + i // 3}"} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_server_is_asked_graded_and_reported(fake: Fake, gsm8k: Path, tmp_path: Path, capsys):
    report = tmp_path / "report.json"
    argv = ["gsm8k", "--base-url", fake.url, "--data-path", str(gsm8k), "--num-shots", "1"]
    assert main([*argv, "--api-key", "secret", "--output", str(report)]) == 0
    out = capsys.readouterr()
    assert "sglang-gsm8k-v1: 3 questions, 1 shots" in out.out
    assert "accuracy 0.667 [0.208, 0.939]  2/3 right, 0 invalid" in out.out
    assert "tokens a second" in out.out and "3/3" in out.err
    path, body, key = min(fake.asked, key=lambda asked: asked[1]["prompt"])
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert body == {
        "model": "fake",
        "temperature": 0,
        "n": 1,
        "max_tokens": 512,
        "stop": ["Question", "Assistant:", "<|separator|>"],
        "prompt": "Question: Q0?\nAnswer: #### 2\n\nQuestion: Q1?\nAnswer:",
    }
    read = json.loads(report.read_text())
    assert read["protocol"] == "sglang-gsm8k-v1" and read["shots"].startswith("Question: Q0?")
    assert [q["server"]["verdict"] for q in read["questions"]] == ["right", "right", "wrong"]
    assert read["questions"][2]["right_answer"] == 3
    assert read["questions"][2]["server"]["text"] == fake.text
    assert read["runs"][0]["completion_tokens"] == 21


def test_mgsm_by_chat_with_an_invalid_answer(fake: Fake, tmp_path: Path, capsys):
    for language in ("en", "de"):
        (tmp_path / f"mgsm_{language}.tsv").write_text("Q?\t2\n")
    fake.text = "Answer: 2"
    files = [str(path) for path in sorted(tmp_path.glob("*.tsv"))]
    argv = ["mgsm", "--base-url", fake.url + "/v1/", "--data-path", *files]
    assert main([*argv, "--chat", '{"enable_thinking": false}']) == 0
    out = capsys.readouterr().out
    assert "0/1 right, 1 invalid" in out and "1/1 right, 0 invalid" in out
    path, body, _ = fake.asked[0]
    assert path == "/v1/chat/completions" and body["messages"][0]["content"].endswith("\n\nQ?")
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and "stop" not in body


def test_two_servers_without_log_probabilities_compare_by_verdicts(fake: Fake, gsm8k: Path, capsys):
    argv = ["gsm8k", "--base-url", fake.url, "--data-path", str(gsm8k), "--num-shots", "0"]
    assert main([*argv, "--compare", "eager", "--eager-url", fake.url]) == 0
    assert "the same text: 4 of 4" in capsys.readouterr().out
    assert fake.asked[0][1]["logprobs"] == 20


def test_a_busy_server_is_asked_again_and_a_refusal_ends_the_run(fake: Fake, gsm8k: Path, capsys):
    argv = ["gsm8k", "--base-url", fake.url, "--data-path", str(gsm8k), "--num-shots", "3"]
    fake.failures = [503, 429, 200]
    assert main(argv) == 0
    fake.failures = [400]
    assert main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("breakgraph.evaluation: error: ")
    assert "/v1/completions refused with 400" in err and "too long" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model-path", "m", "--num-threads", "2"], "--num-threads does nothing without --base"),
        (["--model-path", "m", "--eager-url", "u"], "--eager-url does nothing without --base-url"),
        (
            ["--base-url", "http://x", "--page-size", "2"],
            "--page-size does nothing with --base-url",
        ),
        (["--base-url", "http://x", "--compare", "eager"], "--eager-url go together"),
        (["--base-url", "x"], "no address; write http://HOST:PORT"),
        (["--base-url", "http://127.0.0.1:9"], "gives no answer.*is a server there"),
        (["--model-path", str(MODEL), "--compare", "eager"], "has no graphs to compare with"),
        (
            ["--model-path", str(MODEL), "--max-gap", "1"],
            "--max-gap does nothing without --compare",
        ),
        (["--model-path", "no-such"], "no-such is not a folder"),
        (  # full graphs are graphs to compare with
            ["--model-path", "x", "--compare", "eager", "--cuda-graph-backend-prefill", "full"],
            "x is not a folder",
        ),
        (["--num-questions", "1"], "--model-path is required"),
        (["--model-path", str(MODEL), "--output", "/no/such/r.json"], "no folder /no/such"),
        (["--model-path", str(MODEL), "--num-shots", "-1"], "--num-shots is at least 0"),
        (["--model-path", str(MODEL), "--device", "cpu", "--chat"], "no chat template"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, gsm8k: Path, monkeypatch, capsys):
    monkeypatch.setattr(answering.time, "sleep", lambda seconds: None)
    assert main(["gsm8k", "--data-path", str(gsm8k), "--num-shots", "0", *argv]) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_chat_in_process_is_by_the_template(gsm8k: Path, tmp_path: Path, capsys):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}{{ word }}")
    argv = ["gsm8k", "--data-path", str(gsm8k), "--num-shots", "0", "--max-new-tokens", "4"]
    engine = ["--model-path", str(MODEL), "--device", "cpu", "--max-total-tokens", "512"]
    chat = ["--chat", '{"word": " 3"}', "--chat-template", str(template)]
    assert main([*argv, *engine, *chat]) == 0
    assert "4 questions" in capsys.readouterr().out


def test_the_public_file_is_fetched_once_and_checked(tmp_path: Path, monkeypatch):
    origin = tmp_path / "origin.jsonl"
    origin.write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checksum = hashlib.sha256(b"{}").hexdigest()
    monkeypatch.setitem(data.PUBLIC, "gsm8k", (origin.as_uri(), checksum))
    path = data.public_file("gsm8k")
    assert path.read_text() == "{}" and path.is_relative_to(tmp_path / "cache")
    origin.unlink()
    assert data.public_file("gsm8k") == path
    path.write_text("spoilt")
    with pytest.raises(ValueError, match=r"cannot be fetched.*with --data-path"):
        data.public_file("gsm8k")
    origin.write_text("other")
    with pytest.raises(ValueError, match=r"SHA-256 differs.*--data-path"):
        data.public_file("gsm8k")
