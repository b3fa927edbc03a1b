"""Packed requests as the recurrent kernels' ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 16


@dataclass
class Plan:
    """Packed requests; the trailing ``spare`` ones are empty, as are the padding chunks."""

    cu_seqlens: torch.Tensor
    initial_slots: torch.Tensor
    final_slots: torch.Tensor
    chunks: torch.Tensor
    chunk_offsets: torch.Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        initial: Sequence[int],
        final: Sequence[int],
        *,
        spare: int = 2,
        padding_chunks: int = 3,
        chunk_size: int = CHUNK,
        device: str = "cpu",
    ) -> Plan:
        padded = [*lengths, *[0] * spare]
        counts = [-(-length // chunk_size) for length in padded]
        cut = [(request, at) for request, count in enumerate(counts) for at in range(count)]
        cut += [(len(padded) - 1, 0)] * (padding_chunks if spare else 0)

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        def offsets(values: Any) -> torch.Tensor:
            return F.pad(ints(values).cumsum(0, dtype=torch.int32), (1, 0))

        return cls(
            offsets(padded),
            ints([*initial, *[-1] * spare]),
            ints([*final, *[0] * spare]),
            ints(cut).view(-1, 2),
            offsets(counts),
        )

    def copy_(self, other: Plan) -> None:
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))
