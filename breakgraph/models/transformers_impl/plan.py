"""What the layers of one forward share, made once for its batch: slots on the device, and masks.

A layer's break then only computes: nothing is uploaded a second time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from breakgraph.forward import ForwardBatch
from breakgraph.models.transformers_impl.reach import Reach

GATHERED_ROWS = 1 << 16
"""Keys gathered at one time for requests of one new token: 0.13 GB with 4 heads of 256 in half
precision, and the values as much."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One request: its rows of the batch, and the slots of the tokens before them."""

    rows: slice
    prefix: int
    slots: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Steps:
    """Requests of one new token each.

    Attributes:
        rows: of the batch.
        slots: int64 ``[requests, longest]``, of the keys that each sees.
        visible: bool ``[requests, longest]``, False behind the last.
    """

    rows: slice
    slots: torch.Tensor
    visible: torch.Tensor


class BatchPlan:
    """The plan of one batch."""

    def __init__(self, batch: ForwardBatch, device: torch.device) -> None:
        self._new, self._prefixes = batch.extend_lens, batch.prefix_lens
        self._prefix_slots, self._own_slots = batch.prefix_slots, batch.out_cache_loc
        self._device = device
        self._sequences: list[Sequence] | None = None
        self._steps: dict[Reach, list[Steps]] = {}

    @property
    def is_step(self) -> bool:
        """Whether each request has one new token, and some tokens before it."""
        return len(self._prefix_slots) > 0 and len(self._new) == len(self._own_slots)

    def sequences(self) -> list[Sequence]:
        """Every request."""
        if self._sequences is None:
            start = slot = 0
            slots = torch.from_numpy(self._prefix_slots).to(self._device)
            self._sequences = []
            for new, prefix in zip(self._new.tolist(), self._prefixes.tolist(), strict=True):
                own = slots[slot : slot + prefix] if prefix else None
                self._sequences.append(Sequence(slice(start, start + new), prefix, own))
                start, slot = start + new, slot + prefix
        return self._sequences

    def steps(self, reach: Reach) -> list[Steps]:
        """Every request of a batch that ``is_step``, a few at a time."""
        if reach not in self._steps:
            self._steps[reach] = list(self._make_steps(reach))
        return self._steps[reach]

    def _make_steps(self, reach: Reach) -> Iterator[Steps]:
        prefixes = np.split(self._prefix_slots, np.cumsum(self._prefixes)[:-1])
        seen = []
        for prefix, own in zip(prefixes, self._own_slots, strict=True):
            begin, _ = reach.keys_of(len(prefix), len(prefix) + 1, len(prefix) + 1)
            seen.append(np.append(prefix[begin:], own))
        first = 0
        while first < len(seen):
            longest, end = len(seen[first]), first + 1
            while end < len(seen):
                wider = max(longest, len(seen[end]))
                if wider * (end + 1 - first) > GATHERED_ROWS:
                    break
                longest, end = wider, end + 1
            lengths = np.array([len(slots) for slots in seen[first:end]])
            visible = np.arange(longest) < lengths[:, None]
            slots = np.zeros((end - first, longest), np.int64)
            slots[visible] = np.concatenate(seen[first:end])
            yield Steps(
                slice(first, end),
                torch.from_numpy(slots).to(self._device),
                torch.from_numpy(visible).to(self._device),
            )
            first = end


class PlanCache:
    """The plan of the latest batch, for all layers of a model; forwards take turns."""

    def __init__(self) -> None:
        self._batch: weakref.ref[ForwardBatch] | None = None
        self._plan: BatchPlan | None = None

    def plan(self, batch: ForwardBatch, device: torch.device) -> BatchPlan:
        """The plan of ``batch``."""
        if self._plan is None or self._batch is None or self._batch() is not batch:
            self._batch, self._plan = weakref.ref(batch), BatchPlan(batch, device)
        return self._plan
