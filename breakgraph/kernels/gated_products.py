"""``silu(gate) * up`` of a matrix product with many rows, at the product's end.

The product of a gate and what it gates is the widest matrix of a layer; here it is never written. A
program multiplies a tile of rows with a tile of the gate's weight and the same tile of the other,
and takes the next tile when it is done; the tensor memory accelerator loads and stores tiles, and
clips them at the edges. Rounding is that of a torch product followed by ``silu_mul``.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads; on a CPU the op is
its plain-torch reference.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from breakgraph.kernels.direct_launch import DirectLaunch, specialized
from breakgraph.kernels.launch import check_rows, import_triton, launches_early, processors
from breakgraph.kernels.pointwise import silu_mul_reference

ROWS, COLUMNS, DEPTH = 128, 128, 64
"""Of a tile: rows of the input, features of the result, what is summed over at once."""

WARPS, STAGES = 8, 3
GROUP = 16
"""Tiles along the rows that follow each other, so that they find a tile of the weight in L2."""

tl: Any = None  # triton.language, once the kernel is made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define("gated_product(Tensor x, Tensor weight) -> Tensor")


def serves_gated(weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies with ``weight: [2 * features, in_features]``.

    It is for 16-bit types on CUDA, from compute capability 9 on.
    """
    features, size = weight.shape[0] // 2, weight.shape[1]
    return (
        weight.is_cuda
        and launches_early(weight.device)
        and weight.dtype.itemsize == 2
        and weight.is_contiguous()
        and size % 8 == features % 8 == 0
    )


def gated_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``.

    Args:
        x: ``[rows, in_features]``, rows strided and dense.
        weight: ``[2 * features, in_features]``, one that ``serves_gated``: the gate's rows, then
            those of what it gates.

    Returns:
        ``[rows, features]``, contiguous.

    Raises:
        ValueError: ``x`` has another layout.
    """
    check_rows(x=x)
    return torch.ops.breakgraph.gated_product(x, weight)


def gated_product_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``gated_product`` in plain torch ops."""
    return silu_mul_reference(F.linear(x, weight))


def _on_cuda(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (rows, size), features = x.shape, weight.shape[0] // 2
    out = x.new_empty(rows, features)
    if rows:
        tiles = -(-rows // ROWS) * -(-features // COLUMNS)
        _kernel()(
            (min(tiles, processors(x.device)), 1, 1),
            (x, weight, out),
            (),
            specialized((features, size, ROWS, COLUMNS, DEPTH, GROUP), WARPS, True, STAGES),
            ((ROWS, DEPTH), (COLUMNS, DEPTH), (ROWS, COLUMNS)),
        )
    return out


_library.impl("gated_product", gated_product_reference, "CPU")
_library.impl("gated_product", _on_cuda, "CUDA")


@cache
def _kernel() -> DirectLaunch:
    """The Triton kernel; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit
    def gated_product_tile(  # type: ignore[no-untyped-def]
        x, weight, out,
        FEATURES: tl.constexpr, SIZE: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        dtype = out.dtype
        down, across = tl.cdiv(x.shape[0], ROWS), tl.cdiv(FEATURES, COLUMNS)
        for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
            group = tile // (GROUP * across)
            high = tl.minimum(down - group * GROUP, GROUP)
            within = tile % (GROUP * across)
            row = (group * GROUP + within % high) * ROWS
            col = (within // high) * COLUMNS
            gate = tl.zeros([ROWS, COLUMNS], tl.float32)
            up = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, SIZE, DEPTH):
                left = x.load([row, k])
                gate = tl.dot(left, weight.load([col, k]).T, gate)
                up = tl.dot(left, weight.load([FEATURES + col, k]).T, up)
            wide = gate.to(dtype).to(tl.float32)
            active = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
            out.store([row, col], (active * up.to(dtype).to(tl.float32)).to(dtype))

    return DirectLaunch(gated_product_tile)
