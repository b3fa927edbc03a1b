"""Replicas behind Ray Serve: one becomes two under load, and both answer alike."""

from __future__ import annotations

import importlib
import json
import socket
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pydantic's, of what Ray Serve declares
    ray = pytest.importorskip("ray", reason="ray is not here: pip install 'breakgraph[serve,ray]'")
    serve = pytest.importorskip("ray.serve")
from breakgraph.server.ray_serve import HEADER, build_app, parse_flags
from server.support import FLAGS, questions

pytestmark = pytest.mark.filterwarnings("ignore:.*metrics_interval_s")
QUICK = {"upscale_delay_s": 0.2, "metrics_interval_s": 0.2, "look_back_period_s": 1.0}
ENVIRON = {
    "RAY_AUTH_MODE": "disabled",  # or it leaves a token in the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Ray on this host alone, with a deployment of one replica that may become two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRON.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        flags = {name: value for name, value in FLAGS.items() if name != "port"}
        flags |= {"piecewise_cuda_graph_tokens": "16 128", "max_running_requests": "8"}
        replicas = {"max_replicas": 2, "target_ongoing_requests": 1, "autoscaling_config": QUICK}
        serve.run(build_app(flags | replicas))
        yield f"http://127.0.0.1:{port}"
        ray.shutdown()


def ask(url: str, prompt: str) -> tuple[str, str]:
    """Which replica answered, and what."""
    fields = {"model": "", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    kind = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(fields).encode(), kind)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers[HEADER], json.load(answer)["choices"][0]["text"]


def test_one_replica_becomes_two_and_both_answer_alike(url: str) -> None:
    prompts = questions(4)
    expected = {prompt: ask(url, prompt) for prompt in prompts}
    assert len({replica for replica, _ in expected.values()}) == 1
    found: dict[str, set[str]] = {}
    end = time.monotonic() + 60
    lock = threading.Lock()

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < end and not done():
            prompt = prompts[turn % len(prompts)]
            replica, text = ask(url, prompt)
            assert text == expected[prompt][1]
            with lock:
                found.setdefault(replica, set()).add(prompt)
            turn += 1

    def done() -> bool:
        with lock:
            return len(found) == 2 and all(len(asked) == len(prompts) for asked in found.values())

    with ThreadPoolExecutor(6) as clients:
        list(clients.map(client, range(6)))
    assert done(), found
    with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        assert answer.status == 200


def test_flags_come_as_text_or_typed() -> None:
    text = {"model-path": "m", "piecewise_cuda_graph_tokens": "64,16", "tp_size": "2"}
    typed = {"model_path": "m", "piecewise_cuda_graph_tokens": [64, 16], "tp_size": 2}
    assert parse_flags(text | {"skip_tokenizer_init": "true"}) == parse_flags(
        typed | {"skip_tokenizer_init": True, "api_key": None}
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model_pth": "m"}, "did you mean --model-path"),
        ({"port": 80}, "Ray's proxies listen"),
        ({"num_replicas": 2, "max_replicas": 2}, "give num_replicas, or max_replicas"),
        ({"min_replicas": 2}, "give num_replicas, or max_replicas"),
        ({"max_replicas": "many"}, "must be a number"),
        ({"moe_scatter": "maybe"}, "--moe-scatter must be true or false"),
        ({"tp_size": "two"}, "tp-size"),
    ],
)
def test_what_is_wrong_is_said(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_app({"model_path": "m"} | wrong)


def test_a_replica_asks_for_as_many_gpus_as_it_has_ranks() -> None:
    def gpus(**flags: Any) -> float:
        built = build_app({"model_path": "m"} | flags)
        return built._bound_deployment.ray_actor_options["num_gpus"]

    assert (gpus(), gpus(tp_size=4), gpus(device="cpu", tp_size=2)) == (1, 4, 0)


def test_without_ray_the_error_says_what_to_install() -> None:
    with mock.patch.dict(sys.modules, {"ray": None}):
        del sys.modules["breakgraph.server.ray_serve"]
        with pytest.raises(ImportError, match=r"pip install 'breakgraph\[serve,ray\]'"):
            importlib.import_module("breakgraph.server.ray_serve")
