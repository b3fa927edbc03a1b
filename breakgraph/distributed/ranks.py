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
from breakgraph.distributed.watch import COLLECTIVE_SECONDS, Watch, ended

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

c10d: Any = dist  # whose stores are not among the names that it exports to a type checker

START_SECONDS = 300.0
CLOSE_SECONDS = 10.0
_FOREVER = timedelta(days=365)
"""For what ranks wait for without a limit, such as the next batch; a Watch ends what is over."""

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
            atexit.register(self.close)

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

    def close(self) -> None:
        """End the watching, and what was spawned if it has not ended by itself; once."""
        if self._closed or self.watch is None:
            return
        self._closed = True
        atexit.unregister(self.close)
        failed = self.watch.failure is not None
        self.watch.stop()
        end_all(self._processes, 0.0 if failed else CLOSE_SECONDS)
        # NCCL would wait for who is gone; gloo has seen their connections close.
        if self._owns_dist and not (failed and dist.get_backend() == "nccl"):
            with suppress(Exception):
                dist.destroy_process_group()


def start_ranks(args: ServerArgs) -> Ranks:
    """Make this process a rank of those that ``args`` ask for.

    Raises:
        ValueError: there cannot be so many here.
        RuntimeError: a spawned rank ended at once, or none came up in time.
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


def _join_torchrun(args: ServerArgs) -> Ranks:
    size = int(os.environ["WORLD_SIZE"])
    if size != args.tp_size:
        raise ValueError(
            f"torchrun started {size} ranks and --tp-size is {args.tp_size}; make them the same"
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    owns = not dist.is_initialized()
    _init_groups(_backend(args), local_rank, init_method="env://") if owns else None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = c10d.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    mine = c10d.PrefixStore(f"breakgraph {attempt} {next(_numbers)}", store)
    group = _make_group(rank, size, local_rank, args, world=owns)
    watch = Watch(rank, size, mine, ends_process=True)
    watch.start()
    return Ranks(group, watch, owns_dist=owns)


def _spawn(args: ServerArgs) -> Ranks:
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is in use in this process already, so --tp-size cannot spawn ranks "
            "from it; start them all by torchrun, or close the other engine first"
        )
    size, threads = args.tp_size, max(1, torch.get_num_threads() // args.tp_size)
    if _backend(args) == "nccl" and torch.cuda.device_count() < size:
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
        _wait_for(processes, store)
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
        _init_groups(_backend(args), rank, store=where, rank=rank, world_size=size)
        group = _make_group(rank, size, rank, args, world=True)
    except BaseException:
        watch.stop()
        raise
    return Ranks(group, watch, processes, store, owns_dist=True)


def _backend(args: ServerArgs) -> str:
    on_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    return "nccl" if on_cuda else "gloo"


def _init_groups(backend: str, local_rank: int, **where: Any) -> None:
    if backend == "nccl":
        # Communicators are made now: in a capture it would be too late.
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        where["device_id"] = device
    dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_SECONDS), **where)


def _make_group(
    rank: int, size: int, local_rank: int, args: ServerArgs, *, world: bool
) -> TensorParallelGroup:
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    data = dist.group.WORLD if world else dist.new_group(backend=_backend(args), timeout=limit)
    control = dist.new_group(backend="gloo", timeout=_FOREVER)
    return TensorParallelGroup(
        rank,
        size,
        local_rank=local_rank,
        data=data,
        control=control,
        scatters_rows=args.moe_scatter,
    )


def _wait_for(processes: Sequence[subprocess.Popen[bytes]], store: Any) -> None:
    """Wait until each rank has connected. Raises RuntimeError, naming one that ended."""
    size, deadline = len(processes) + 1, time.monotonic() + START_SECONDS
    for rank, process in enumerate(processes, 1):
        while not store.check([f"up {rank}"]):
            if process.poll() is not None:
                how = ended(process.returncode)
                raise RuntimeError(f"rank {rank} of {size} {how} at its start")
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
