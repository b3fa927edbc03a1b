"""Ranks, started once, that run one engine after the other: the test process and its children.

``Pair`` stands in for what spawns ranks, so that a test makes ``Engine(tp_size=2)`` in 0.1 s and
not in the 4 s that a new process takes to import torch.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist

from breakgraph.distributed import TensorParallelGroup
from breakgraph.distributed.lockstep import follow
from breakgraph.distributed.process_groups import make_attention_group
from breakgraph.distributed.ranks import Ranks, connect, end_all
from breakgraph.distributed.watch import when_closed
from breakgraph.engine import PrefillResult
from breakgraph.runner import GraphCaptureError, ModelRunner
from breakgraph.runner.graph_runner import GraphRunner
from breakgraph.server_args import ServerArgs


class Pair:
    """Rank 0 of two, or of ``size``."""

    def __init__(self, size: int = 2, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.children = []
        for rank in range(1, size):
            told = [str(value) for value in (rank, size, device, self._store.port)]
            command = [sys.executable, __file__, *told]
            self.children.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environ))
        plain = ServerArgs(model_path="none", device=device, tp_size=size)
        self._ranks = connect(0, size, plain, self._store.port, self.children, self._store)
        self.fails: int | None = None

    def start_ranks(self, args: ServerArgs) -> Ranks:
        """What ``Engine`` calls: the others make a runner too, and fail at capture ``fails``."""
        if args.tp_size == 1:
            return Ranks()
        self._tell([asdict(args), self.fails])
        return lent(self._ranks, args)

    def call(self, function: Callable[[TensorParallelGroup], None]) -> None:
        """Call a function of a module on every rank; what one raises, all raise."""
        self._tell([function.__module__, function.__name__])
        with self._ranks.together():
            function(self._ranks.group)

    def stop(self) -> None:
        self._ranks.group.broadcast(torch.tensor([0]))
        self._ranks.close()
        end_all(self.children, 10)

    def _tell(self, what: Any) -> None:
        text = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8)
        self._ranks.group.broadcast(torch.tensor([len(text)]))
        self._ranks.group.broadcast(text)


def assert_same_prefills(
    found: Sequence[PrefillResult], expected: Sequence[PrefillResult], reason: str
) -> None:
    """The same logits and log-probabilities, ``found`` dispatched for ``reason``."""
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.next_token_logits, other.next_token_logits, atol=1e-4, rtol=1e-4
        )
        assert ours.reason == reason
        pairs = zip(ours.input_token_logprobs, other.input_token_logprobs, strict=True)
        assert all(x is y is None or abs(x - y) < 1e-3 for x, y in pairs)


def lent(ranks: Ranks, args: ServerArgs) -> Ranks:
    """The same ranks for one engine, which does not close them."""
    copy = Ranks(ranks.group)
    copy.watch, copy._closed = ranks.watch, False
    copy.close = lambda **how: None  # type: ignore[method-assign]
    group = ranks.group
    group.scatters_rows = args.moe_scatter
    group.attention = make_attention_group(group.rank, group.size, args) or group
    return copy


@contextmanager
def failing_captures(fails: int | None) -> Any:
    """Let the capture number ``fails`` of this process, from 0, fail."""
    real, count = GraphRunner._capture_bucket, 0

    def capture_bucket(self: GraphRunner, bucket: int) -> Any:
        nonlocal count
        count += 1
        if count - 1 == fails:
            raise GraphCaptureError("out of luck")
        return real(self, bucket)

    with mock.patch.object(GraphRunner, "_capture_bucket", capture_bucket):
        yield


def main(rank: int, size: int, device: Literal["cpu", "cuda"], port: int) -> None:
    when_closed(open(0, "rb", buffering=0, closefd=False), lambda: os._exit(1))  # noqa: SIM115
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    plain = ServerArgs(model_path="none", device=device, tp_size=size)
    ranks = connect(rank, size, plain, port, store=store)
    while count := int(ranks.group.broadcast(torch.zeros(1, dtype=torch.int64))[0]):
        told = ranks.group.broadcast(torch.zeros(count, dtype=torch.uint8))
        values, fails = json.loads(bytes(told.tolist()))
        if isinstance(values, str):
            with ranks.together():
                getattr(importlib.import_module(values), fails)(ranks.group)
            continue
        args = ServerArgs(**values)
        mine = lent(ranks, args)
        try:
            with failing_captures(fails):
                runner = ModelRunner(args, ranks=mine)
        except (GraphCaptureError, ValueError):
            continue  # as rank 0 does
        with mine.together():
            follow(mine, runner)
    ranks.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
