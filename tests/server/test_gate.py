"""Strangers, floods and silence are refused at the gate, and clients that leave take all along."""

import base64
import json
import socket
import time
from collections.abc import Iterator

import pytest

from .support import Running, connection, openai, post, running, wait_for

ASK = {"prompt": "Tom has", "max_tokens": 4}


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(api_key="öpen sesame", enable_breakable_cuda_graph=False) as server:
        yield server


def answer(sock: socket.socket) -> tuple[int, bytes]:
    """The status and body of what a raw socket gets, to its end."""
    data = b""
    while part := sock.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_a_key_opens_everything_and_health_needs_none(locked: Running):
    with locked.http() as http:
        assert http.get("/health").status_code == 200
        for method, path in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/get_server_info"),
            ("GET", "/health_generate"),
            ("GET", "/"),
            ("GET", "/health/"),
            ("GET", "/nothing"),
        ):
            refused = http.request(method, path, json=ASK)
            assert refused.status_code == 401, path
            assert refused.json()["error"]["code"] == "invalid_api_key"
        key = base64.b64encode("any:öpen sesame".encode()).decode()
        info = http.get("/get_server_info", headers={"authorization": f"Basic {key}"})
        assert info.status_code == 200 and "sesame" not in info.text
        assert http.get("/").headers["www-authenticate"].startswith("Basic")
        for wrong in ("Bearer", "Bearer other", "Basic ???", "sesame", f"Digest {key}"):
            refused = http.get("/v1/models", headers={"authorization": wrong})
            assert refused.status_code == 401
        right = http.get("/v1/models", headers={"authorization": "Bearer öpen sesame".encode()})
        assert right.status_code == 200
    with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
        locked.client(api_key="wrong").models.list()


def test_a_body_over_the_limit_is_a_413(server: Running):
    with server.http() as http:
        big = http.post("/v1/completions", json=ASK | {"user": "x" * (1 << 16)})
        assert big.status_code == 413 and "--max-body-bytes" in big.json()["error"]["message"]

        def parts() -> Iterator[bytes]:  # chunked: no length is announced
            for _ in range(20):
                yield b"x" * 8192

        assert http.post("/v1/completions", content=parts()).status_code == 413
        assert http.post("/v1/completions", json=ASK).status_code == 200
    with server.connect() as sock:  # announced, and never sent
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n"
        )
        assert answer(sock)[0] == 413


def test_what_is_no_http_is_answered_and_closed(server: Running):
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n"):
        with server.connect() as sock:
            sock.sendall(data)
            assert answer(sock)[0] == 400


def test_half_a_request_is_waited_for_only_so_long(server: Running, monkeypatch):
    monkeypatch.setattr(connection, "RECEIVE_SECONDS", 0.3)
    whole = post("/v1/completions", ASK)
    for part in (b"", b"POST /v1/comp", whole[:-5]):
        with server.connect() as sock:
            began = time.monotonic()
            sock.sendall(part)
            assert sock.recv(100) == b""
            assert 0.2 < time.monotonic() - began < 5
    with server.connect() as sock:  # slow, but in time
        sock.sendall(whole[:-5])
        time.sleep(0.05)
        sock.sendall(whole[-5:])
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_goes_away_takes_its_request_with_it(server: Running):
    ask = {"prompt": "Tom", "max_tokens": 2000, "ignore_eos": True}
    for stream in (True, False):
        with server.connect() as sock:
            sock.sendall(post("/v1/completions", ask | {"stream": stream, "n": 2}))
            if stream:
                assert b"200" in sock.recv(1000)
            wait_for(lambda: server.engine.snapshot().running == 2)
        wait_for(lambda: server.engine.snapshot().running == 0, seconds=3)
        server.wait_until_empty()
    assert server.metric("breakgraph_http_requests_total") > 0


def test_a_client_that_reads_nothing_holds_nobody_up_and_is_cut_off(server: Running, monkeypatch):
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.5)
    ask = {"prompt": "Tom", "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 4}
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(server.address)
        # Log-probabilities make the answer larger than the kernel will hold for anyone.
        sock.sendall(post("/v1/completions", ask | {"logprobs": 100}))
        wait_for(lambda: server.engine.snapshot().running == 4)
        with server.http() as http:
            assert http.post("/v1/completions", json=ASK).status_code == 200
        wait_for(lambda: server.engine.snapshot().running == 0, seconds=20)


def test_a_full_queue_is_a_503_with_a_time_to_come_back():
    flags = {"max_running_requests": 1, "max_queued_requests": 2}
    with running(enable_breakable_cuda_graph=False, **flags) as server, server.http() as http:
        ask = {"prompt": "Tom", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with server.connect() as sock:
            sock.sendall(post("/v1/completions", ask))
            wait_for(lambda: server.engine.snapshot().running == 1)
            full = http.post("/v1/completions", json=ASK | {"n": 5})
            assert full.status_code == 503 and full.headers["retry-after"] == "1"
            assert full.json()["error"]["code"] == "queue_full"
        server.wait_until_empty()
        assert http.post("/v1/completions", json=ASK).status_code == 200


def test_a_request_out_of_time_is_a_504():
    with running(enable_breakable_cuda_graph=False, request_seconds=0.2) as server:
        ask = {"prompt": "Tom", "max_tokens": 2000, "ignore_eos": True}
        with server.http() as http:
            late = http.post("/v1/completions", json=ask)
            assert late.status_code == 504 and "--request-seconds" in late.text
            stream = http.post("/v1/completions", json=ask | {"stream": True})
            *_, last, done = stream.text.strip().split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline"
            assert done == "data: [DONE]"
        server.wait_until_empty()


def test_an_exception_fails_its_request_alone(server: Running, monkeypatch):
    runner = server.engine.runner
    forward = runner.forward

    def failing(batch, **options):
        if 666 in batch.input_ids:
            raise RuntimeError("a broken forward")
        return forward(batch, **options)

    monkeypatch.setattr(runner, "forward", failing)
    with server.http() as http:
        broken = http.post("/v1/completions", json={"prompt": [666, 5]})
        assert broken.status_code == 500 and "a broken forward" in broken.text
        assert http.post("/v1/completions", json=ASK).status_code == 200
        monkeypatch.setattr(server.engine, "explain", lambda ids: 1 / 0)
        broken = http.post("/explain", json={"num_tokens": [5]})
        assert broken.status_code == 500 and "division" not in broken.text
        assert broken.json()["error"]["type"] == "server_error"
        assert http.get("/health").status_code == 200


def test_a_dead_model_thread_fails_health():
    with running(enable_breakable_cuda_graph=False) as server, server.http() as http:
        server.engine._scheduler.step = lambda: 1 / 0
        failed = http.post("/v1/completions", json=ASK)
        assert failed.status_code == 500
        health = http.get("/health")
        assert health.status_code == 503 and "ZeroDivisionError" in health.text
        assert http.post("/v1/completions", json=ASK).status_code == 503
        assert "breakgraph_healthy 0.0" in http.get("/metrics").text
