"""``python -m breakgraph.launch_server`` as a process: it starts, says where, and drains."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from breakgraph.cli import main

from .support import MODEL, ROOT, post, wait_for

COMMAND = [sys.executable, "-m", "breakgraph.launch_server", "--model-path", str(MODEL)]
FLAGS = ["--device", "cpu", "--port", "0", "--max-total-tokens", "4096"]
LONG = {"prompt": "Tom", "max_tokens": 150, "ignore_eos": True, "temperature": 0}


@contextmanager
def launched(*flags: str) -> Iterator[tuple[subprocess.Popen, str, str]]:
    """The process, its summary line and its address."""
    graphs = ["--enable-breakable-cuda-graph", "--piecewise-cuda-graph-tokens", "16", "32"]
    process = subprocess.Popen(
        [*COMMAND, *FLAGS, *graphs, "--chunked-prefill-size=32", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    try:
        summary, address = process.stdout.readline(), process.stdout.readline().strip()
        yield process, summary, address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_sigterm_finishes_what_runs_and_refuses_what_comes():
    with launched() as (process, summary, address):
        assert "Qwen3ForCausalLM in float32 on cpu" in summary
        assert "2 prefill graphs of 16 to 32 tokens" in summary and "ready in" in summary
        texts: list[str] = []

        def read() -> None:
            with httpx2.stream(
                "POST", f"{address}/v1/completions", json=LONG | {"stream": True}, timeout=30
            ) as stream:
                texts.extend(line for line in stream.iter_lines() if line)

        with httpx2.Client(base_url=address, timeout=30) as http:
            whole = http.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
            reader = threading.Thread(target=read)
            reader.start()
            wait_for(lambda: len(texts) > 3)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: http.get("/health").status_code == 503)
            refused = http.post("/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
        reader.join(20)
        assert process.wait(10) == 0
        *events, done = [line.removeprefix("data: ") for line in texts]
        assert done == "[DONE]"
        assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == whole


def test_the_drain_is_bounded():
    with launched("--drain-seconds", "0.5") as (process, _, address):
        host, port = re.match(r"http://(.*):(\d+)", address).groups()
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            sock.sendall(post("/v1/completions", LONG | {"max_tokens": 2000, "stream": True}))
            assert sock.recv(100)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
            assert time.monotonic() - began < 8


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = main(["serve", "--model-path", str(MODEL), "--device", "cpu", "--port", str(port)])
    assert code == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err
