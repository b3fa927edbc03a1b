"""Collectives as ops: a capture audits them, a CUDA graph holds them, a tape replays them.

An op is given its group by name, since a capture fixes tensors and constants alone. On CUDA they
are NCCL's, on the current stream and so in the segment being captured; on a CPU gloo's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define("all_reduce_(Tensor(a!) x, str group) -> ()")
_library.define("all_gather(Tensor x, int size, str group) -> Tensor")
_library.define("reduce_scatter(Tensor x, int rank, int size, str group) -> Tensor")

_groups: list[Any] = []
_silent: set[str] = set()


class CollectiveError(RuntimeError):
    """Another rank did not take part: it is gone, or late beyond the time limit."""


class Entered:
    """How many collectives this process has entered; the rank behind the others is the late one."""

    count = 0


def register(process_group: Any) -> str:
    """A name for ops to find ``process_group`` by, never used again."""
    _groups.append(process_group)
    return str(len(_groups) - 1)


@contextmanager
def guarded() -> Iterator[None]:
    """Turn what torch.distributed raises into CollectiveError."""
    Entered.count += 1
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise CollectiveError(f"{type(error).__name__}: {error}") from error


@contextmanager
def uncounted() -> Iterator[None]:
    """Around collectives in which not all ranks have a part."""
    count = Entered.count
    try:
        yield
    finally:
        Entered.count = count


@contextmanager
def silent_on_cpu(*names: str) -> Iterator[None]:
    """Let the collectives of these groups do nothing to CPU tensors."""
    _silent.update(names)
    try:
        yield
    finally:
        _silent.difference_update(names)


def _is_silent(x: torch.Tensor, group: str) -> bool:
    return not x.is_cuda and group in _silent


def _all_reduce(x: torch.Tensor, group: str) -> None:
    if not _is_silent(x, group):
        with guarded():
            dist.all_reduce(x, group=_groups[int(group)])


def _all_gather(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    shape = (size * len(x), *x.shape[1:])
    if _is_silent(x, group):
        return x.new_zeros(shape)
    out = x.new_empty(shape)
    with guarded():
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out, x.contiguous(), group=_groups[int(group)])
    return out


def _reduce_scatter(x: torch.Tensor, rank: int, size: int, group: str) -> torch.Tensor:
    rows = -(-len(x) // size)
    padded = x
    if rows * size != len(x):
        padded = x.new_zeros(rows * size, *x.shape[1:])
        padded[: len(x)] = x
    if _is_silent(x, group):
        return x.new_zeros(rows, *x.shape[1:])
    out = x.new_empty(rows, *x.shape[1:])
    with guarded():
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(out, padded.contiguous(), group=_groups[int(group)])
    return out


for _name, _function in (
    ("all_reduce_", _all_reduce),
    ("all_gather", _all_gather),
    ("reduce_scatter", _reduce_scatter),
):
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
