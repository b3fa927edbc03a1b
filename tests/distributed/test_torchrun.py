"""Ranks that torchrun starts: on one host, and as two launchers that stand for two hosts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from engine_support import save_byte_model
from launcher import FLAGS, Output, complete

from breakgraph.distributed import watch as watching
from breakgraph.distributed.watch import RankFailedError, Watch

ENVIRON = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")
PROMPTS = ["hello", "x" * 90, "a longer prompt than the first"]
GRAPHS = ["--enable-breakable-cuda-graph", "--piecewise-cuda-graph-tokens", "16", "128"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_byte_model(folder)
    return folder


@contextmanager
def two_nodes(command: list[str]) -> Iterator[list[Output]]:
    """Two torchrun launchers of one rank each, which meet at a port of this host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    with ExitStack() as stack:
        nodes = []
        for rank in (0, 1):
            nodes.append(Output([*torchrun, "--node-rank", str(rank), *command], ENVIRON))
            stack.callback(nodes[-1].end)
        yield nodes


@LINUX
def test_two_nodes_answer_as_one_rank_and_end_when_one_dies(folder: Path) -> None:
    command = ["-m", "breakgraph", "serve", "--model-path", str(folder), "--port", "0"]
    flags = ["--device", "cpu", *GRAPHS]
    alone = Output([*command, *flags])
    with two_nodes([*command, *flags, *FLAGS]) as nodes, ExitStack() as stack:
        stack.callback(alone.end)
        for server in (alone, nodes[0]):
            server.wait_for("http://")
        expected = [complete(alone.address, prompt, 8) for prompt in PROMPTS]
        assert [complete(nodes[0].address, prompt, 8) for prompt in PROMPTS] == expected
        assert "http://" not in nodes[1].output
        [rank] = nodes[1].children()
        os.kill(rank, signal.SIGKILL)
        began = time.monotonic()
        codes = [node.wait(30) for node in nodes]
        assert time.monotonic() - began < 30 and 0 not in codes
        assert f"rank 1 of 2 on {socket.gethostname()} has not answered" in nodes[0].output


@LINUX
def test_a_signal_to_both_nodes_ends_the_server_in_order(folder: Path) -> None:
    command = ["-m", "breakgraph.launch_server", "--model-path", str(folder), "--port", "0"]
    with two_nodes([*command, "--device", "cpu", *FLAGS]) as nodes:
        nodes[0].wait_for("http://")
        for node in nodes:
            for child in node.children():
                os.kill(child, signal.SIGTERM)
        assert [node.wait(30) for node in nodes] == [0, 0], nodes[0].output + nodes[1].output


class Stuck(dict):
    """A store on a host that is gone without a word."""

    def set(self, key: str, value: str) -> None:
        threading.Event().wait()


def test_a_store_that_never_answers_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(watching, "STALE_SECONDS", 0.3)
    watch = Watch(1, 2, Stuck(), ends_process=False)
    watch._seen[0] = ("7 100 here", 0.0)
    watch.busy = False
    watch.start()
    assert watch._failed.wait(20)
    with pytest.raises(RankFailedError, match="rank 0 of 2 on here does not answer"):
        watch.check()


def standalone(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A torchrun of two ranks on this host."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "breakgraph", "run", "--model-path", str(folder), "--prompt", "hi"]
    return subprocess.run(
        [sys.executable, *command, "--max-new-tokens", "4", "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | ENVIRON,
    )


def test_torchrun_starts_the_ranks_of_a_host(folder: Path) -> None:
    ended = standalone(folder, *FLAGS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("prefill forwards") == 1  # rank 0's, and nobody else's


def test_another_number_of_ranks_is_one_clear_error(folder: Path) -> None:
    ended = standalone(folder)
    said = "torchrun started 2 ranks, over all hosts, and --tp-size is 1"
    assert ended.returncode != 0 and ended.stderr.count(said) == 1, ended.stderr
