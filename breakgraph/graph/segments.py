"""Segments: the captured stretches between breaks, on a GPU or on the tape.

All segments of a graph live in one pool and are captured on one stream; a pool block freed
in one segment serves the next, which is safe because replays run in capture order. Unless a
capture is dry, a segment is run once as soon as it is captured, so that the break after it works
on real values at capture too, on both devices alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from breakgraph.graph.provenance import Ownership


class Segment(Protocol):
    """One captured stretch."""

    replay: Callable[[], Any]
    num_nodes: int
    asked_bytes: int
    """What it asked of the pool, with the landings of the break before it, freed since or not."""
    grown_bytes: int
    """By how much the pool grew for that; the rest was memory that earlier tensors had freed."""

    def node_names(self) -> list[str]:
        """The kernels or ops, in capture order."""

    def reset(self) -> None:
        """Let go of executables and memory."""


class SegmentBackend(Protocol):
    """How segments are captured on one kind of device."""

    pool: Any
    allows_random: bool
    """Whether a segment may draw random numbers, new ones at each replay."""

    def enter(self, stack: ExitStack) -> None:
        """Make the device ready for segments; what ``stack`` unwinds restores it."""

    def begin(self) -> None: ...

    def end(self) -> Segment:
        """Close the open segment, and run it once unless the capture is dry."""

    def abort(self) -> None:
        """Close the open segment, whatever state it is in, without raising."""

    def check_stream(self, op: Any) -> None:
        """Raise UnjoinedStreamError if ``op`` is about to run outside the capture."""

    def record(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        fresh: list[torch.Tensor],
        ownership: Ownership,
    ) -> Any:
        """Note an op that just ran; returns the result for the caller."""

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same pool memory, without keeping it from reuse."""

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pool memory of the tensor's layout, between segments."""


def tensor_at(storage: Any, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``like``'s view of ``storage``: its offset, sizes, strides and lazy bits."""
    bare = torch.empty(0, dtype=like.dtype, device=device)
    same = bare.set_(storage, like.storage_offset(), like.size(), like.stride())
    same = same.conj() if like.is_conj() else same
    return same._neg_view() if like.is_neg() else same
