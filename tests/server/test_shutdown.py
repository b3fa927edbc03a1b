"""``python -m breakgraph.launch_server`` as a process: it starts, says where, and drains."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from breakgraph.cli import main

from .support import MODEL, ROOT, httpx2, post, running, wait_for

COMMAND = [sys.executable, "-m", "breakgraph.launch_server", "--model-path", str(MODEL)]
FLAGS = ["--device", "cpu", "--port", "0", "--max-total-tokens", "4096"]
LONG = {"prompt": "Tom", "max_tokens": 150, "ignore_eos": True, "temperature": 0}


@contextmanager
def launched() -> Iterator[tuple[subprocess.Popen, str, str]]:
    """The process, its summary line and its address."""
    graphs = ["--enable-breakable-cuda-graph", "--piecewise-cuda-graph-tokens", "16", "32"]
    process = subprocess.Popen(
        [*COMMAND, *FLAGS, *graphs, "--chunked-prefill-size=32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads that spin for a busy core cost seconds
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


def test_the_drain_is_bounded_and_a_second_signal_ends_it():
    for signals, least, most in ((1, 0.5, 6), (2, 0.0, 3)):
        drain = 0.5 if signals == 1 else 60.0
        with running(enable_breakable_cuda_graph=False, drain_seconds=drain) as server:
            ask = LONG | {"max_tokens": 2000, "stream": True}
            with server.connect() as sock:
                sock.sendall(post("/v1/completions", ask))
                assert sock.recv(100)
                began = time.monotonic()
                for _ in range(signals):
                    server.server.handle_exit(signal.SIGTERM, None)
                server.thread.join(10)
                assert least <= time.monotonic() - began < most
            wait_for(lambda: server.engine.snapshot().running == 0)


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = main(["serve", "--model-path", str(MODEL), "--device", "cpu", "--port", str(port)])
    assert code == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err
