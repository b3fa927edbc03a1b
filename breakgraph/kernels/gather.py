"""Rows of a table: token embeddings, cosines and sines of positions, last rows of requests.

torch has a slow kernel for few rows and makes a cast another kernel; this one casts what it reads,
and starts while the kernel ahead still runs.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU the op is
its plain-torch reference.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from breakgraph.kernels.direct_launch import DirectLaunch, specialized
from breakgraph.kernels.launch import import_triton, launches_early

BLOCK, WARPS = 1024, 4
"""Elements of a row that a program copies, and its warps."""

tl: Any = None  # triton.language, once the kernel is made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define("gather_rows(Tensor table, Tensor index, Tensor(a!) out) -> ()")


def gather_rows(
    table: torch.Tensor,
    index: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``table[index]``, cast.

    Args:
        table: ``[entries, ...]``, contiguous but for the distance of its entries.
        index: int64 ``[rows]``, contiguous; every entry must be there, which CUDA does not check.
        out: ``[rows, ...]``, contiguous; None makes one.
        dtype: of what is made; None is the table's.

    Returns:
        ``out``.

    Raises:
        ValueError: a layout has gaps, or ``out`` has another shape.
    """
    shape = (*index.shape, *table.shape[1:])
    if out is None:
        out = torch.empty(shape, dtype=dtype or table.dtype, device=table.device)
    dense = table.is_contiguous() or table[:1].is_contiguous()
    if index.dim() != 1 or out.shape != shape or not (dense and out.is_contiguous()):
        raise ValueError(
            f"table {list(table.shape)}, index {list(index.shape)} and out {list(out.shape)} must "
            "be [entries, ...], [rows] and [rows, ...], and contiguous"
        )
    torch.ops.breakgraph.gather_rows(table, index, out)
    return out


def gather_rows_reference(table: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """``gather_rows`` in plain torch ops."""
    out.copy_(table.index_select(0, index))


def _on_cuda(table: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    rows = len(index)
    if out.numel():
        size, early = out.numel() // rows, launches_early(out.device)
        constants = (table.stride(0), size, BLOCK, early)
        _kernel()(
            (rows, -(-size // BLOCK), 1),
            (table, index, out),
            (),
            specialized(constants, WARPS, early),
        )


_library.impl("gather_rows", gather_rows_reference, "CPU")
_library.impl("gather_rows", _on_cuda, "CUDA")


@cache
def _kernel() -> DirectLaunch:
    """The Triton kernel; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit
    def gather_rows(  # type: ignore[no-untyped-def]
        table, index, out,
        ENTRY: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        row = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(table + tl.load(index + row) * ENTRY + col, mask=col < SIZE)
        tl.store(out + row * SIZE + col, value.to(out.dtype.element_ty), mask=col < SIZE)

    return DirectLaunch(gather_rows)
