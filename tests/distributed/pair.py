"""Two ranks, started once, that run one engine after the other: the test process and a child.

``Pair`` stands in for what spawns ranks, so that a test makes ``Engine(tp_size=2)`` in 0.1 s and
not in the 4 s that a new process takes to import torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from breakgraph.distributed.lockstep import follow
from breakgraph.distributed.ranks import Ranks, connect, end_all
from breakgraph.distributed.watch import when_closed
from breakgraph.runner import GraphCaptureError, ModelRunner
from breakgraph.runner.graph_runner import GraphRunner
from breakgraph.server_args import ServerArgs

PLAIN = ServerArgs(model_path="none", device="cpu", tp_size=2)


class Pair:
    """Rank 0 of two."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.child = subprocess.Popen(
            [sys.executable, __file__, str(self._store.port)], stdin=subprocess.PIPE, env=environ
        )
        self._ranks = connect(0, 2, PLAIN, self._store.port, [self.child], self._store)
        self.fails: int | None = None

    def start_ranks(self, args: ServerArgs) -> Ranks:
        """What ``Engine`` calls: rank 1 makes a runner too, and fails at its capture ``fails``."""
        if args.tp_size == 1:
            return Ranks()
        text = json.dumps([asdict(args), self.fails]).encode()
        told = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._ranks.group.broadcast(torch.tensor([len(told)]))
        self._ranks.group.broadcast(told)
        return lent(self._ranks, args)

    def stop(self) -> None:
        self._ranks.group.broadcast(torch.tensor([0]))
        self._ranks.close()
        end_all([self.child], 10)


def lent(ranks: Ranks, args: ServerArgs) -> Ranks:
    """The same ranks for one engine, which does not close them."""
    copy = Ranks(ranks.group)
    copy.watch, copy._closed = ranks.watch, False
    copy.close = lambda: None  # type: ignore[method-assign]
    ranks.group.scatters_rows = args.moe_scatter
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


def main(port: int) -> None:
    when_closed(open(0, "rb", buffering=0, closefd=False), lambda: os._exit(1))  # noqa: SIM115
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    ranks = connect(1, 2, PLAIN, port, store=store)
    while count := int(ranks.group.broadcast(torch.zeros(1, dtype=torch.int64))[0]):
        told = ranks.group.broadcast(torch.zeros(count, dtype=torch.uint8))
        values, fails = json.loads(bytes(told.tolist()))
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
    main(int(sys.argv[1]))
