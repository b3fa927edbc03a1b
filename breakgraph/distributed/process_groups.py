"""torch's process groups of the ranks: made before any capture, ended after every graph.

NCCL can make no communicator inside a capture, and waits at a communicator's end for the graphs
that use it, and for the other ranks. So ranks end their groups together, once they have let go of
their graphs, or, where that was not agreed, not at all.
"""

from __future__ import annotations

import atexit
import signal
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from breakgraph.distributed.group import SINGLE, TensorParallelGroup
from breakgraph.distributed.watch import COLLECTIVE_SECONDS

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

CLOSE_SECONDS = 10.0
EXIT_SECONDS = 10
"""Longest that this process takes to exit where NCCL was not ended."""

_FOREVER = timedelta(days=365)
"""For what ranks wait for without a limit, such as the next batch; a Watch ends what is over."""


def backend_of(args: ServerArgs) -> str:
    """What carries tensors between the ranks."""
    on_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    return "nccl" if on_cuda else "gloo"


def init_groups(backend: str, local_rank: int, **where: Any) -> None:
    """Make the group of all ranks, and this process' GPU the current one.

    Raises:
        ValueError: there is no such GPU.
    """
    if backend == "nccl":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"local rank {local_rank} of {socket.gethostname()} has no GPU: torch sees "
                f"{count}; start one rank a GPU (--nproc-per-node)"
            )
        where["device_id"] = torch.device("cuda", local_rank)
        torch.cuda.set_device(where["device_id"])
        atexit.register(_bound_exit)
    dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_SECONDS), **where)


def make_group(
    rank: int, size: int, local_rank: int, args: ServerArgs, *, world: bool
) -> TensorParallelGroup:
    """What layers use: the group of all ranks (``world``), or one of its own, and gloo's."""
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    data = dist.group.WORLD if world else dist.new_group(backend=backend_of(args), timeout=limit)
    control = dist.new_group(backend="gloo", timeout=_FOREVER)
    return TensorParallelGroup(
        rank,
        size,
        local_rank=local_rank,
        data=data,
        control=control,
        scatters_rows=args.moe_scatter,
        attention=make_attention_group(rank, size, args),
    )


def make_attention_group(rank: int, size: int, args: ServerArgs) -> TensorParallelGroup | None:
    """The ranks that hold the same requests as ``rank``: neighbours, so of one host where hosts
    have as many. None where all ranks do. Every rank makes the groups of all."""
    each = size // args.dp_size
    if each == size:
        return None
    if each == 1:
        return SINGLE
    how: Any = {"backend": backend_of(args), "timeout": timedelta(seconds=COLLECTIVE_SECONDS)}
    groups = [dist.new_group(range(first, first + each), **how) for first in range(0, size, each)]
    return TensorParallelGroup(rank % each, each, data=groups[rank // each])


def end_groups(*, together: bool) -> None:
    """End all groups, ``together`` if the other ranks do so now.

    If they do not, NCCL, which would wait for them, is left alone; gloo sees connections close.
    """
    global _left_alone
    nccl = dist.get_backend() == "nccl"

    def end() -> None:
        with suppress(Exception):
            dist.destroy_process_group()

    ending = threading.Thread(target=end, name="breakgraph-end", daemon=True)
    if together or not nccl:
        try:
            ending.start()
            ending.join(CLOSE_SECONDS)
        except RuntimeError:  # Python 3.12 starts no thread while it exits
            end()
    _left_alone = nccl and (not together or ending.is_alive())


_left_alone = False


def _bound_exit() -> None:
    """NCCL, left alone, may hold up the end of the process, where no Python runs any more."""
    if _left_alone:
        signal.alarm(EXIT_SECONDS)
