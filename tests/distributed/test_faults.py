"""A rank that dies ends the launcher, within 30 seconds and by name.

The launchers of all cases start side by side: most of their time they import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_support import save_byte_model
from launcher import Launcher, check_kill

from breakgraph import Engine
from breakgraph.distributed.watch import RankFailedError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")
BUCKETS = [str(bucket) for bucket in range(8, 513)]
GRAPHS = ["--enable-breakable-cuda-graph", "--piecewise-cuda-graph-tokens", *BUCKETS]
CASES: dict[str, list[str]] = {"capture": GRAPHS, "idle": [], "prefill": []}


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Launcher]]:
    folder = tmp_path_factory.mktemp("model")
    save_byte_model(folder)
    cpu = ["--device", "cpu"]
    started = {name: Launcher(folder, [*cpu, *flags]) for name, flags in CASES.items()}
    yield started
    for launcher in started.values():
        launcher.end()


@LINUX
def test_a_killed_rank_ends_the_launcher_by_name(launchers) -> None:
    # One test, so that workers of pytest-xdist do not start all launchers each.
    for when, launcher in launchers.items():
        check_kill(when, launcher)


def test_an_engine_says_which_rank_died_and_another_can_be_made(tmp_path: Path) -> None:
    save_byte_model(tmp_path)
    flags = {"model_path": str(tmp_path), "device": "cpu", "max_total_tokens": 512}
    with Engine(tp_size=2, **flags) as engine:
        [process] = engine._ranks._processes
        process.kill()
        for _ in range(2):
            with pytest.raises(RankFailedError, match="rank 1 of 2 was killed by SIGKILL"):
                engine.generate(["hello"], max_new_tokens=2)
    with Engine(**flags) as engine:
        assert len(engine.generate(["hello"], max_new_tokens=2)[0].token_ids) == 2
    assert not torch.distributed.is_initialized()
