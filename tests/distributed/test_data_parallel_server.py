"""A server whose ranks hold different requests: it answers as one rank does, and ends by name."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_support import save_byte_model
from launcher import Launcher, check_kill, complete

from breakgraph import Engine
from breakgraph.distributed.watch import RankFailedError

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GRAPHS = ["--enable-breakable-cuda-graph", "--piecewise-cuda-graph-tokens", "32", "128"]
TEXTS = ["a", "bc" * 9, "hello there", "x" * 60, "one two", "three" * 4, "z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_byte_model(folder, "Qwen3MoeForCausalLM", **MOE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Launcher]:
    launcher = Launcher(folder, ["--device", "cpu", "--dp-size", "2", *GRAPHS])
    yield launcher
    launcher.end()


@pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")
def test_a_server_answers_from_both_ranks_and_ends_with_either(folder: Path, server) -> None:
    with Engine(model_path=str(folder), device="cpu", max_total_tokens=512) as engine:
        expected = [r.text for r in engine.generate(TEXTS, max_new_tokens=8)]
    server.wait_for("http://")
    with ThreadPoolExecutor(len(TEXTS)) as threads:
        found = list(threads.map(lambda text: complete(server.address, text, 8), TEXTS))
    assert found == expected
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    assert "breakgraph_kv_free_tokens 8192" in metrics  # of both
    check_kill("prefill", server)


@pytest.mark.parametrize("size", [2, 4])
def test_an_engine_says_which_rank_died(folder: Path, size: int) -> None:
    flags = {"model_path": str(folder), "device": "cpu", "max_total_tokens": 512}
    with Engine(tp_size=size, dp_size=2, **flags) as engine:
        engine.generate(["hello"], max_new_tokens=2)
        engine._ranks._processes[0].kill()
        for _ in range(2):
            with pytest.raises(RankFailedError, match=f"rank 1 of {size} was killed by SIGKILL"):
                engine.generate(["hello"], max_new_tokens=2)
