"""CUDA-graph semantics on the CPU.

A tape holds the aten ops of one segment with their tensors. Replaying runs the ops again
and writes each result into the memory recorded at capture: Python does not run again,
addresses are fixed, stale inputs stay stale, and what a stream capture cannot hold is
refused. Its pool gives a block to the next tensor as soon as the last reference to the
former one is gone, as a graph's pool does, so a lifetime bug shows here too.
"""

from __future__ import annotations

import time
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any

import torch

from breakgraph.graph.arguments import tensors_in
from breakgraph.graph.callsite import call_site
from breakgraph.graph.errors import RefusedOpError
from breakgraph.graph.op_traits import INDEXING, REALLOCATING, traits_of

_GRANULE = 512


class TapePool:
    """Blocks of host memory that tape tensors live in; shared by graphs captured in turn."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._free: list[tuple[int, int]] = []
        self.num_bytes = 0
        """Bytes of all blocks, in use or free."""
        self.asked_bytes = 0
        """Bytes of all allocations so far, freed since or not."""

    def allocate(self, num_bytes: int) -> tuple[torch.UntypedStorage, torch.UntypedStorage]:
        """Memory of at least ``num_bytes``, as two storages over one block.

        The block is free again when the first storage dies; the second one keeps the block's
        memory valid without keeping it from reuse.
        """
        need = -(-max(num_bytes, 1) // _GRANULE) * _GRANULE
        self.asked_bytes += need
        at = bisect_left(self._free, (need, -1))
        if at < len(self._free):
            _, index = self._free.pop(at)
        else:
            index = len(self._blocks)
            self._blocks.append(torch.empty(need, dtype=torch.uint8))
            self.num_bytes += need
        block = self._blocks[index]
        view = memoryview(block.numpy())  # type: ignore[arg-type]
        weakref.finalize(view, insort, self._free, (block.numel(), index)).atexit = False
        owner = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
        return owner, block.untyped_storage()

    def poison(self) -> None:
        """Fill every block with 0xFF: NaN in each floating dtype, -1 in the integer ones."""
        for block in self._blocks:
            block.fill_(0xFF)


class Tape:
    """The recorded ops of one segment."""

    def __init__(self) -> None:
        self._ops: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __len__(self) -> int:
        return len(self._ops)

    @property
    def op_names(self) -> list[str]:
        return [str(op[0]) for op in self._ops]

    def record(
        self,
        op: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        targets: Sequence[torch.Tensor | None],
    ) -> None:
        """Add one op; ``targets`` has a tensor for each result to write back, None for the rest."""
        written = targets if any(target is not None for target in targets) else ()
        self._ops.append((op, args, kwargs, list(written)))

    def replay(self) -> None:
        for op, args, kwargs, targets in self._ops:
            result = op(*args, **kwargs)
            if targets:
                _write_back(targets, result)

    def timed_replay(self) -> list[tuple[str, int, int]]:
        """Replay; each op's name, begin and end by ``time.perf_counter_ns``."""
        spans = []
        for op, args, kwargs, targets in self._ops:
            begin = time.perf_counter_ns()
            result = op(*args, **kwargs)
            if targets:
                _write_back(targets, result)
            spans.append((str(op), begin, time.perf_counter_ns()))
        return spans


def _write_back(targets: Sequence[torch.Tensor | None], result: Any) -> None:
    results = [result] if isinstance(result, torch.Tensor) else tensors_in(result)
    for target, tensor in zip(targets, results, strict=True):
        if target is not None:
            target.copy_(tensor)


UNWRITTEN = tuple(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
"""Ops that give memory and write nothing; like a graph, a tape does nothing for them."""

_MASKS = (torch.bool, torch.uint8)


def refuse_uncapturable(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, allow_random: bool
) -> None:
    """Raise RefusedOpError if no graph can hold ``op``."""
    if not traits_of(op).refusable:
        return
    tags, packet = op.tags, op.overloadpacket
    reason = ""
    if packet in REALLOCATING:
        reason = "moves a tensor to other memory"
    elif torch.Tag.data_dependent_output in tags:
        reason = "reads a value back from the device, which waits for it"
    elif packet in INDEXING and not _static_index(args):
        reason = "counts a mask, which waits for the device; use torch.where instead"
    elif torch.Tag.dynamic_output_shape in tags and not (
        packet in INDEXING or kwargs.get("output_size") is not None
    ):
        reason = "gives a result whose shape depends on the data"
    elif (
        not allow_random and torch.Tag.nondeterministic_seeded in tags and _draws(op, args, kwargs)
    ):
        reason = "draws random numbers"
    if reason:
        raise RefusedOpError(
            f"{op} {reason} ({call_site()}); a graph segment cannot hold it. Move it into an "
            "eager_on_graph break, or out of the captured code."
        )


def _static_index(args: tuple[Any, ...]) -> bool:
    """Whether no index is a mask, or the masked elements are filled with one host scalar."""
    masked = any(index is not None and index.dtype in _MASKS for index in args[1])
    filled = len(args) > 2 and args[2].numel() == 1 and args[2].device.type == "cpu"
    return filled or not masked


def _draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Fused attentions carry the random tag but draw only to drop out."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else argument.default_value
            return bool(kwargs.get("dropout_p", given))
    return True
