"""Starting and ending the ranks of a model: spawned here, or by torchrun.

Rank 0 is the process that was asked for an engine. It spawns the others as processes that are
given its flags, or finds itself, and them, started by torchrun. Every rank then loads its share
of the model; what they agree on goes over a group of the hosts, tensors over one of the devices.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from breakgraph.distributed.group import SINGLE, TensorParallelGroup
from breakgraph.distributed.process_groups import (
    CLOSE_SECONDS,
    backend_of,
    end_groups,
    init_groups,
    make_group,
)
from breakgraph.distributed.watch import Watch, ended

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

c10d: Any = dist  # whose stores are not among the names that it exports to a type checker

START_SECONDS = 300.0
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
_numbers = itertools.count()


class Ranks:
    """This process among the ranks of one model.

    Attributes:
        group: for layers and runners.
        watch: None with one rank.
    """

    def __init__(
        self,
        group: TensorParallelGroup = SINGLE,
        watch: Watch | None = None,
        processes: Sequence[subprocess.Popen[bytes]] = (),
        store: Any = None,
        *,
        owns_dist: bool = False,
    ) -> None:
        self.group, self.watch = group, watch
        self._processes, self._store, self._owns_dist = processes, store, owns_dist
        self._closed = watch is None
        if not self._closed:
            atexit.register(self.close, agreed=False)

    @property
    def closed(self) -> bool:
        return self._closed

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do: an exception inside ends them all, as RankFailedError.

        Raises:
            RankFailedError: a rank has failed, before or inside.
        """
        if self.watch is None:
            yield
            return
        self.watch.check()
        self.watch.busy = True
        try:
            yield
        except Exception as error:
            raise self.watch.explain(error) from error
        finally:
            self.watch.busy = False

    def close(self, *, agreed: bool = True) -> None:
        """End the watching and the groups, and what was spawned if it has not ended by itself.

        Closing again does nothing.

        Args:
            agreed: whether the other ranks do so too, as at the end of what they follow.
        """
        if self._closed or self.watch is None:
            return
        self._closed = True
        atexit.unregister(self.close)
        together = agreed and self.watch.failure is None
        self.watch.stop()
        if not together:
            end_all(self._processes, 0.0)
        if self._owns_dist:
            end_groups(together=together)
        end_all(self._processes, CLOSE_SECONDS)


def start_ranks(args: ServerArgs) -> Ranks:
    """Make this process a rank of those that ``args`` ask for.

    Raises:
        ValueError: there cannot be so many here.
        RuntimeError: a spawned rank ended at once, or one did not come up in time.
    """
    if args.tp_size == 1:
        return Ranks()
    if environ_has_torchrun():
        return _join_torchrun(args)
    return _spawn(args)


def environ_has_torchrun() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process."""
    return os.environ.keys() >= _TORCHRUN


def is_follower(args: ServerArgs) -> bool:
    """Whether this process was started to follow another, not to serve."""
    return args.tp_size > 1 and environ_has_torchrun() and os.environ["RANK"] != "0"


def check_torchrun(args: ServerArgs) -> None:
    """Raise ValueError where torchrun has started more ranks, or fewer, than ``args`` ask for.

    Of the ranks of a host one says so, and the others wait for torchrun to end them.
    """
    if not environ_has_torchrun() or int(os.environ["WORLD_SIZE"]) == args.tp_size:
        return
    if os.environ["LOCAL_RANK"] != "0":
        time.sleep(CLOSE_SECONDS)
        raise SystemExit(2)
    raise ValueError(
        f"torchrun started {os.environ['WORLD_SIZE']} ranks, over all hosts, and --tp-size is "
        f"{args.tp_size}; make them the same"
    )


def _join_torchrun(args: ServerArgs) -> Ranks:
    check_torchrun(args)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    size, owns = args.tp_size, not dist.is_initialized()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's first agent holds the store; where the variables were set otherwise, rank 0 does.
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    how = {"wait_for_workers": False, "timeout": timedelta(seconds=START_SECONDS)}
    store = c10d.TCPStore(address, port, is_master=holds, multi_tenant=True, **how)
    own = c10d.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"breakgraph {attempt} {next(_numbers)}"
    mine, own = c10d.PrefixStore(prefix, store), c10d.PrefixStore(prefix, own)
    watch = Watch(rank, size, own, ends_process=True, host=socket.gethostname())
    watch.start()
    try:
        mine.set(f"up {rank}", "")
        _wait_for(range(size), mine)
        if owns:
            where = c10d.PrefixStore("groups", mine)
            init_groups(backend_of(args), local_rank, store=where, rank=rank, world_size=size)
        group = make_group(rank, size, local_rank, args, world=owns)
    except BaseException:
        watch.stop()
        raise
    return Ranks(group, watch, store=store, owns_dist=owns)


def _spawn(args: ServerArgs) -> Ranks:
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use in this process already, so --tp-size cannot spawn ranks "
            "from it; start them all by torchrun, or close the other engine first"
        )
    size, threads = args.tp_size, max(1, torch.get_num_threads() // args.tp_size)
    if backend_of(args) == "nccl" and torch.cuda.device_count() < size:
        raise ValueError(
            f"--tp-size {size} needs as many GPUs, and torch sees {torch.cuda.device_count()}"
        )
    store = c10d.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": str(threads),
    }
    processes = []
    try:
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-m", "breakgraph.distributed.worker"],
                stdin=subprocess.PIPE,
                env=environ,
            )
            processes.append(process)
            told = {"rank": rank, "size": size, "port": store.port, "args": asdict(args)}
            assert process.stdin is not None
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()  # and stays open: its end is how a rank knows that we are gone
        _wait_for(range(1, size), store, processes)
        return connect(0, size, args, store.port, processes, store)
    except BaseException:
        end_all(processes, 0.0)
        raise


def connect(
    rank: int,
    size: int,
    args: ServerArgs,
    port: int,
    processes: Sequence[subprocess.Popen[bytes]] = (),
    store: Any = None,
) -> Ranks:
    """Join the ranks whose store listens on ``port`` of this host; waits for all of them."""
    limit = timedelta(seconds=START_SECONDS)
    if store is None:
        store = c10d.TCPStore("127.0.0.1", port, size, is_master=False, timeout=limit)
        store.set(f"up {rank}", "")
    # The watching must not wait while the main thread waits, so it has a connection of its own.
    own = c10d.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    watch = Watch(rank, size, own, processes, ends_process=rank > 0)
    watch.start()
    try:
        where = c10d.PrefixStore("groups", store)
        init_groups(backend_of(args), rank, store=where, rank=rank, world_size=size)
        group = make_group(rank, size, rank, args, world=True)
    except BaseException:
        watch.stop()
        raise
    return Ranks(group, watch, processes, store, owns_dist=True)


def _wait_for(ranks: range, store: Any, processes: Sequence[subprocess.Popen[bytes]] = ()) -> None:
    """Wait until each rank has connected. Raises RuntimeError, naming one that ended."""
    size, deadline = ranks.stop, time.monotonic() + START_SECONDS
    for rank in ranks:
        while not store.check([f"up {rank}"]):
            code = processes[rank - 1].poll() if processes else None
            if code is not None:
                raise RuntimeError(f"rank {rank} of {size} {ended(code)} at its start")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {rank} of {size} did not come up in {START_SECONDS:.0f} s"
                )
            time.sleep(0.05)


def end_all(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for processes to end by themselves, then kill what is left."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
