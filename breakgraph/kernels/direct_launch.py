"""Launching a compiled Triton kernel without Triton's binder.

A kernel launched here takes tensors first, then plan tensors (declared ``do_not_specialize``), then
compile-time constants, and no other number. So what it was compiled for is known by its constants
and by the tensors' dtypes and 16-byte alignment, and is found by one look-up; a plan's arrays lie
one after the other at offsets that change with the batch, so their alignment compiles nothing.
Triton's own launch binds and specializes each argument anew: with 20 to 30 of them it keeps the
host for 5 to 9 µs more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Specialization:
    """What a kernel is compiled for besides dtypes and alignments; made once for each layout.

    It is compared by identity, because to hash thirty strides for each launch costs 1 µs.

    Attributes:
        constants: the kernel's last arguments, all of them ``tl.constexpr``.
        warps: of a program.
        stages: depth of its software pipelines.
        early: whether it may start while the kernel ahead still runs; see ``launches_early``.
    """

    constants: tuple[Any, ...]
    warps: int
    stages: int = 1
    early: bool = False


def specialized(constants: tuple[Any, ...], warps: int, early: bool = False) -> Specialization:
    """The one specialization of these constants, for a kernel with few of them."""
    return _specialized(constants, tuple(map(type, constants)), warps, early)


@cache
def _specialized(
    constants: tuple[Any, ...], types: tuple[type, ...], warps: int, early: bool
) -> Specialization:
    # By their types too: 0.0 equals False, and Triton takes no float for a condition.
    return Specialization(constants, warps, early=early)


class DirectLaunch:
    """One Triton kernel, compiled once for each set of constants, dtypes and alignments."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: Grid,
        tensors: tuple[torch.Tensor, ...],
        plan: tuple[torch.Tensor, ...],
        special: Specialization,
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: programs along each axis; nothing is launched where one is 0.
            tensors: the kernel's first arguments.
            plan: integer tensors, its next ones.
            special: its last arguments, and how to compile it.
        """
        device = tensors[0].get_device()
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = (
            special,
            device,
            tuple([tensor.dtype for tensor in (*tensors, *plan)]),
            tuple([pointer % 16 == 0 for pointer in pointers]),
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[grid](
                *(*tensors, *plan, *special.constants),
                num_warps=special.warps,
                num_stages=special.stages,
                **({"launch_pdl": True} if special.early else {}),
            )
            return
        compiled.run(
            *grid,
            torch._C._cuda_getCurrentRawStream(device),
            compiled.function,
            compiled.packed_metadata,
            *(None, None, None),  # no launch hooks, and nothing to tell them
            *pointers,
            *[tensor.data_ptr() for tensor in plan],
            *special.constants,
        )
