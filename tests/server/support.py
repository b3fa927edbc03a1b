"""A real server on a real socket, in a thread, with its engine in reach.

Where a package is missing, importing this skips the importing module: so tests take from here what
they need of such packages.
"""

# ruff: noqa: E402

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client", "httpx2", "openai"):
    pytest.importorskip(name, reason=f"{name} is not here: pip install 'breakgraph[dev,serve]'")

import httpx2
import openai
from prometheus_client.parser import text_string_to_metric_families

from breakgraph.engine.async_engine import AsyncEngine
from breakgraph.server import connection
from breakgraph.server.app import create_app
from breakgraph.server.connection import DrainingServer, make_server
from breakgraph.server.gate import Gate
from breakgraph.server.metrics import ServerMetrics
from breakgraph.server.serve import bound_socket
from breakgraph.server_args import ServerArgs

__all__ = ["ServerMetrics", "connection", "httpx2", "openai", "text_string_to_metric_families"]

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "examples" / "arithmetic" / "qwen3"
PROBLEMS = ROOT / "examples" / "arithmetic" / "test.jsonl"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}Answer:"
FLAGS: dict[str, Any] = {
    "model_path": str(MODEL),
    "device": "cpu",
    "port": 0,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "enable_breakable_cuda_graph": True,
    "piecewise_cuda_graph_tokens": (16, 32, 64, 128),
    "chunked_prefill_size": 128,
    "max_body_bytes": 1 << 16,
}


def questions(count: int) -> list[str]:
    lines = PROBLEMS.read_text().splitlines()[:count]
    return [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]


@dataclass
class Running:
    """A server that runs, and its parts."""

    engine: AsyncEngine
    gate: Gate
    server: DrainingServer
    thread: threading.Thread
    address: tuple[str, int]

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0} | options
        )

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        values = [
            line.rpartition(" ")[2] for line in lines if line.split("{")[0].split()[0] == name
        ]
        return sum(map(float, values))

    def wait_until_empty(self) -> None:
        """Raise if a request still holds something after a while."""
        scheduler = self.engine._scheduler
        wait_for(lambda: not self.gate.in_flight and not self.engine._streams)
        wait_for(lambda: scheduler.idle_and_empty)


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.01)


@contextmanager
def running(**flags: Any) -> Iterator[Running]:
    """A server of the example model, with ``flags`` over the usual ones."""
    args = ServerArgs(**FLAGS | flags)
    engine = AsyncEngine(args)
    engine.start()
    gate = create_app(engine)
    sock = bound_socket(args.host, args.port)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)  # so that a slow reader is felt
    ready = threading.Event()
    server = make_server(
        gate, drain_seconds=args.drain_seconds, log_level="warning", on_ready=ready.set
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
    thread.start()
    try:
        assert ready.wait(10)
        yield Running(engine, gate, server, thread, sock.getsockname()[:2])
    finally:
        server.should_exit = True
        thread.join(10)
        engine.shutdown(1.0)
        sock.close()
        assert not thread.is_alive()


def post(path: str, body: bytes | dict[str, Any], *headers: str) -> bytes:
    """A request as bytes, for a raw socket."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    head += [f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + data
