"""A rank that dies ends the launcher, within 30 seconds and by name.

The launchers of all cases start side by side: most of their time they import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_support import save_byte_model

from breakgraph import Engine
from breakgraph.distributed.watch import RankFailedError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")
BUCKETS = [str(bucket) for bucket in range(8, 513)]
GRAPHS = ["--enable-breakable-cuda-graph", "--piecewise-cuda-graph-tokens", *BUCKETS]
CASES: dict[str, list[str]] = {"capture": GRAPHS, "idle": [], "prefill": []}
FLAGS = ["--device", "cpu", "--tp-size", "2", "--max-total-tokens", "4096"]


class Launcher:
    """A server of two ranks, and what it has printed."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        command = [sys.executable, "-m", "breakgraph.launch_server", "--model-path", str(folder)]
        command += ["--port", "0", *FLAGS, *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.output = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while chunk := os.read(self.process.stdout.fileno(), 4096):
            self.output += chunk.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    @property
    def address(self) -> str:
        return next(line for line in self.output.splitlines() if line.startswith("http://"))

    def children(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Launcher]]:
    folder = tmp_path_factory.mktemp("model")
    save_byte_model(folder)
    started = {name: Launcher(folder, flags) for name, flags in CASES.items()}
    yield started
    for launcher in started.values():
        launcher.process.kill()
        launcher.process.wait()


def complete(address: str, prompt: str) -> str:
    """What a server adds to ``prompt``."""
    fields = {"model": "", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    body = json.dumps(fields).encode()
    kind = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", body, kind)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["text"]


def flood(address: str, stop: threading.Event) -> None:
    """Prompts of 90 tokens, each different, one after the other."""
    number = 0
    while not stop.is_set():
        number += 1
        with contextlib.suppress(OSError):
            complete(address, f"{number:06d}" + "x" * 84)


@LINUX
def test_a_killed_rank_ends_the_launcher_by_name(launchers) -> None:
    # One test, so that workers of pytest-xdist do not start all launchers each.
    for when, launcher in launchers.items():
        check_kill(when, launcher)


def check_kill(when: str, launcher: Launcher) -> None:
    stop = threading.Event()
    launcher.wait_for("capturing prefill" if when == "capture" else "http://")
    if when == "prefill":
        assert complete(launcher.address, "hello") == complete(launcher.address, "hello")
        for _ in range(3):
            threading.Thread(target=flood, args=(launcher.address, stop), daemon=True).start()
        time.sleep(0.5)
    [rank] = launcher.children()
    os.kill(rank, signal.SIGKILL)
    code = launcher.process.wait(30)
    stop.set()
    launcher.reader.join(10)
    assert code not in (0, None)
    assert "rank 1 of 2 was killed by SIGKILL" in launcher.output, launcher.output
    if when == "capture":
        assert "http://" not in launcher.output


def test_torchrun_starts_the_ranks_too(tmp_path: Path) -> None:
    save_byte_model(tmp_path)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += ["-m", "breakgraph", "run", "--model-path", str(tmp_path), "--prompt", "hi"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, *run, "--max-new-tokens", "4", *FLAGS],
        capture_output=True,
        text=True,
        timeout=120,
        env=environ,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("prefill forwards") == 1  # rank 0's, and nobody else's


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
