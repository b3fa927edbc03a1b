"""Segments on the CPU: a tape each, in a pool of host memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from breakgraph.graph.arguments import map_tensors, tensors_in
from breakgraph.graph.segments import tensor_at
from breakgraph.graph.tape import UNWRITTEN, Tape, TapePool

if TYPE_CHECKING:
    from breakgraph.graph.provenance import Ownership

CPU = torch.device("cpu")


class TapeSegment:
    """A tape, run by the same protocol as a CUDA graph."""

    def __init__(self, tape: Tape, asked_bytes: int = 0, grown_bytes: int = 0) -> None:
        self.replay: Callable[[], Any] = tape.replay
        self.num_nodes = len(tape)
        self.asked_bytes, self.grown_bytes = asked_bytes, grown_bytes
        self._tape: Tape | None = tape

    def node_names(self) -> list[str]:
        return self._tape.op_names if self._tape is not None else []

    def timed_replay(self) -> list[tuple[str, int, int]]:
        """Replay; each op's name, begin and end by ``time.perf_counter_ns``."""
        return self._tape.timed_replay() if self._tape is not None else []

    def reset(self) -> None:
        self._tape = None
        self.replay = lambda: None


class TapeBackend:
    """Segments on the CPU."""

    allows_random = False

    def __init__(self, pool: TapePool | None) -> None:
        self.pool = TapePool() if pool is None else pool
        self._tape = Tape()
        self._blocks: dict[int, torch.UntypedStorage] = {}
        self._counted = (self.pool.asked_bytes, self.pool.num_bytes)

    def enter(self, stack: ExitStack) -> None:
        stack.callback(self._blocks.clear)

    def begin(self) -> None:
        self._tape = Tape()

    def end(self) -> TapeSegment:
        asked, grown = self._counted
        if not len(self._tape):  # left out of the graph: the next segment counts its memory
            return TapeSegment(self._tape)
        self._counted = (self.pool.asked_bytes, self.pool.num_bytes)
        return TapeSegment(self._tape, self._counted[0] - asked, self._counted[1] - grown)

    def abort(self) -> None:
        self._tape = Tape()

    def check_stream(self, op: Any) -> None: ...

    def record(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        fresh: list[torch.Tensor],
        ownership: Ownership,
    ) -> Any:
        results = tensors_in(result)
        views_only = results and not fresh and not op._schema.is_mutable
        if views_only or torch.Tag.inplace_view in op.tags:
            return result
        moved: dict[int, torch.UntypedStorage] = {}
        landed = {id(tensor): self._land(tensor, moved, ownership) for tensor in fresh}
        if op.overloadpacket not in UNWRITTEN:
            self._tape.record(
                op,
                map_tensors(args, self._by_address),
                map_tensors(kwargs, self._by_address),
                [self.alias(landed[id(t)]) if id(t) in landed else None for t in results],
            )
        return map_tensors(result, lambda tensor: landed.get(id(tensor), tensor))

    def _land(
        self, tensor: torch.Tensor, moved: dict[int, torch.UntypedStorage], ownership: Ownership
    ) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in moved:
            moved[storage._cdata] = self._allocate(storage.nbytes())
        landed = tensor_at(moved[storage._cdata], tensor, CPU)
        landed.copy_(tensor)
        ownership.note_made(moved[storage._cdata])
        return landed

    def _allocate(self, num_bytes: int) -> torch.UntypedStorage:
        owner, block = self.pool.allocate(num_bytes)
        self._blocks[owner._cdata] = block
        return owner

    def _by_address(self, tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.untyped_storage()._cdata in self._blocks
        return self.alias(tensor) if made else tensor.detach()

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor_at(self._blocks[tensor.untyped_storage()._cdata], tensor, CPU)

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        layout = torch.empty_like(tensor, device="meta")
        return tensor_at(self._allocate(layout.untyped_storage().nbytes()), layout, CPU)
