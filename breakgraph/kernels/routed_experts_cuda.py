"""The CUDA side of ``routed_experts``: four Triton kernels and their launches.

No launch depends on the routing: a grid is as large as the worst routing of that many rows needs,
each program finds its expert and rows from offsets on the device, and one with nothing to do ends.
An expert's rows are padded to whole blocks, after MegaBlocks (Gale et al., 2022), in registers
alone: in memory they lie one after the other.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

from breakgraph.kernels.launch import import_triton, power_of_two

V = TypeVar("V")


class Blocks(NamedTuple):
    """What a program of a product holds: rows, columns and depth; its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FEW, MANY = 16, 64
"""Mean assignments of an expert, up to which a launch takes the first and the second blocks."""

UP_BLOCKS = (Blocks(16, 64, 128, 4, 3), Blocks(64, 64, 64, 4, 4), Blocks(128, 128, 64, 8, 4))
DOWN_BLOCKS = (Blocks(16, 128, 128, 4, 3), Blocks(64, 128, 64, 4, 4), Blocks(128, 256, 64, 8, 4))
"""On an H200 in bfloat16 128 experts of 768 over 2048, 8 a row, of 16, 128, 512, 2048 and 8192 rows
take, up with its activation, 123, 188, 198, 280 and 841 µs, and down 65, 100, 113, 176 and 459.
torch's grouped products alone take 183, 266, 264, 362 and 685, and 114, 155, 149, 205 and 450."""

EXACT_BLOCKS = (Blocks(16, 64, 32, 4, 2),) * 3
"""In float32, which the matrix units do not multiply exactly."""

SORT_CHUNKS = ((1024, 4), (4096, 8))
"""Assignments that a program of the sort reads at a time, and its warps: few, and many. 16 rows of
8 take 3.1 µs, 2048 16.8; torch's sort and what goes with it 18 and 51."""

SUM_COLUMNS, SUM_WARPS = 1024, 4

tl: Any = None  # triton.language, once the kernels are made


def sort_routes_on_cuda(
    experts: torch.Tensor,
    num_token_non_padded: torch.Tensor | None,
    first: int,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``sort_routes`` by Triton."""
    count, top_k = experts.numel(), experts.shape[1]
    rows = experts.new_empty(count, dtype=torch.int32)
    places = torch.empty_like(experts, dtype=torch.int32)
    offsets = experts.new_empty(num_experts, dtype=torch.int32)
    padded = num_token_non_padded is not None
    chosen = SORT_CHUNKS[count > SORT_CHUNKS[0][0]]
    for chunk, warps in _launches(("sort", top_k, first, num_experts, padded), SORT_CHUNKS, chosen):
        _kernels().sort_routes[(num_experts + 1,)](
            *(experts, num_token_non_padded if padded else offsets, rows, offsets, places, count),
            FIRST=first,
            EXPERTS=num_experts,
            TOP_K=top_k,
            PADDED=padded,
            CHUNK=chunk,
            num_warps=warps,
        )
    return rows, offsets, places


def routed_up_on_cuda(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    gated: bool,
    spread: int,
) -> torch.Tensor:
    """``routed_up`` by Triton."""
    hidden = x.new_empty(len(rows), weight.shape[1] // (2 if gated else 1))
    table = UP_BLOCKS if x.dtype.itemsize == 2 else EXACT_BLOCKS
    key = ("up", tuple(weight.shape), x.stride(0), x.dtype, gated)
    for blocks in _launches(key, table, _choice(table, len(rows) / spread)):
        tensors = (x, rows, offsets, weight, hidden)
        _launch_product(_kernels().routed_up, tensors, blocks, X_ROW=x.stride(0), GATED=gated)
    return hidden


def routed_down_on_cuda(
    hidden: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, spread: int
) -> torch.Tensor:
    """``routed_down`` by Triton."""
    routed = hidden.new_empty(len(hidden), weight.shape[1])
    table = DOWN_BLOCKS if hidden.dtype.itemsize == 2 else EXACT_BLOCKS
    key = ("down", tuple(weight.shape), hidden.dtype)
    for blocks in _launches(key, table, _choice(table, len(hidden) / spread)):
        _launch_product(_kernels().routed_down, (hidden, offsets, weight, routed), blocks)
    return routed


def sum_routed_on_cuda(
    routed: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``sum_routed`` by Triton."""
    rows, top_k = places.shape
    size = routed.shape[1]
    out = routed.new_empty(rows, size)
    if out.numel():
        _kernels().sum_routed[(rows, -(-size // SUM_COLUMNS))](
            *(routed, places, weights, out),
            SIZE=size,
            TOP_K=top_k,
            COLUMNS=SUM_COLUMNS,
            num_warps=SUM_WARPS,
        )
    return out


def _launch_product(
    kernel: Any, tensors: tuple[torch.Tensor, ...], blocks: Blocks, **constants: int
) -> None:
    weight, out = tensors[-2:]
    experts, (assignments, size) = len(weight), out.shape
    # Each expert's last block may be nearly empty, and no block is quite empty.
    tiles = min(assignments, assignments // blocks.rows + experts)
    if tiles and size:
        kernel[(tiles, -(-size // blocks.columns))](
            *tensors,
            **constants,
            IN=weight.shape[2],
            OUT=size,
            EXPERTS=experts,
            EXPERTS_2=power_of_two(experts),
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            DEPTH=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


def _choice(table: tuple[Blocks, ...], mean: float) -> Blocks:
    return table[(mean > FEW) + (mean > MANY)]


_launched: set[Hashable] = set()


def _launches(key: Hashable, variants: tuple[V, ...], chosen: V) -> tuple[V, ...]:
    """What to launch: ``chosen``, and for a new ``key`` every variant before it.

    All give the same result. So what a warm-up of one row count compiles serves captures of all.
    """
    if key in _launched:
        return (chosen,)
    _launched.add(key)
    return (*dict.fromkeys(variants), chosen)


class _Kernels(NamedTuple):
    sort_routes: Any
    routed_up: Any
    routed_down: Any
    sum_routed: Any


@cache
def _kernels() -> _Kernels:
    """The Triton kernels; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit(do_not_specialize=["assignments"])
    def sort_routes(  # type: ignore[no-untyped-def]
        experts,
        count,
        rows,
        offsets,
        places,
        assignments,
        FIRST: tl.constexpr,
        EXPERTS: tl.constexpr,
        TOP_K: tl.constexpr,
        PADDED: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """A program an expert: how many come before it, then its own; the last, what is nowhere."""
        expert = tl.program_id(0)
        live = assignments
        if PADDED:
            live = tl.minimum(assignments, tl.load(count) * TOP_K)
        step = tl.arange(0, CHUNK)
        before = tl.zeros([CHUNK], tl.int32)
        for start in range(0, assignments, CHUNK):
            at = start + step
            key = tl.load(experts + at, mask=at < live, other=-1) - FIRST
            before += ((at < live) & (key >= 0) & (key < expert)).to(tl.int32)
        place = tl.sum(before, 0)
        for start in range(0, assignments, CHUNK):
            at = start + step
            key = tl.load(experts + at, mask=at < live, other=-1) - FIRST
            here = (at < live) & (key >= 0) & (key < EXPERTS)
            mine = here & (key == expert)
            to = place + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(rows + to, at // TOP_K, mask=mine)
            nowhere = (expert == EXPERTS) & (at < assignments) & (here == 0)
            tl.store(places + at, tl.where(mine, to, -1), mask=mine | nowhere)
            place += tl.sum(mine.to(tl.int32), 0)
        if expert < EXPERTS:
            tl.store(offsets + expert, place)

    @triton.jit
    def find(  # type: ignore[no-untyped-def]
        offsets, tile, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, ROWS: tl.constexpr
    ):
        """The expert of this tile, EXPERTS if none, the tile's first row and the expert's end."""
        expert = tl.arange(0, EXPERTS_2)
        held = expert < EXPERTS
        end = tl.load(offsets + expert, mask=held, other=0)
        begin = tl.load(offsets + expert - 1, mask=held & (expert > 0), other=0)
        tiles = tl.where(held, (end - begin + ROWS - 1) // ROWS, 0)
        ends = tl.cumsum(tiles, 0)
        found = tl.sum(((ends <= tile) & held).to(tl.int32), 0)
        mine = expert == found
        first = tl.sum(tl.where(mine, ends - tiles, 0), 0)
        start = tl.sum(tl.where(mine, begin, 0), 0) + (tile - first) * ROWS
        return found, start, tl.sum(tl.where(mine, end, 0), 0)

    @triton.jit
    def routed_up(  # type: ignore[no-untyped-def]
        x,
        rows,
        offsets,
        weight,
        hidden,
        X_ROW: tl.constexpr,
        GATED: tl.constexpr,
        IN: tl.constexpr,
        OUT: tl.constexpr,
        EXPERTS: tl.constexpr,
        EXPERTS_2: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        expert, start, end = find(offsets, tl.program_id(0), EXPERTS, EXPERTS_2, ROWS)
        if expert >= EXPERTS:
            return
        at = start + tl.arange(0, ROWS)
        live = at < end
        row = tl.load(rows + tl.where(live, at, start)).to(tl.int64)
        col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        held = col < OUT
        k = tl.arange(0, DEPTH)
        wide = 2 * OUT if GATED else OUT
        left = x + row[:, None] * X_ROW + k[None, :]
        within = tl.where(held, col, 0)[None, :] * IN + k[:, None]
        right = weight + expert.to(tl.int64) * wide * IN + within
        first = tl.zeros([ROWS, COLUMNS], tl.float32)
        second = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, IN, DEPTH):
            if IN % DEPTH == 0:
                a = tl.load(left + depth)
                b = tl.load(right + depth)
            else:
                inside = k < IN - depth
                a = tl.load(left + depth, mask=inside[None, :], other=0.0)
                b = tl.load(right + depth, mask=inside[:, None], other=0.0)
            first = tl.dot(a, b, first, input_precision="ieee")
            if GATED:
                if IN % DEPTH == 0:
                    c = tl.load(right + OUT * IN + depth)
                else:
                    inside = k < IN - depth
                    c = tl.load(right + OUT * IN + depth, mask=inside[:, None], other=0.0)
                second = tl.dot(a, c, second, input_precision="ieee")
        if GATED:
            first = first / (1.0 + tl.exp(-first)) * second
        else:
            first = tl.where(first < 0, 0.0, first)  # keeps NaN, as relu does
            first = first * first
        to = hidden + at[:, None].to(tl.int64) * OUT + col[None, :]
        tl.store(to, first.to(hidden.dtype.element_ty), mask=live[:, None] & held[None, :])

    @triton.jit
    def routed_down(  # type: ignore[no-untyped-def]
        hidden,
        offsets,
        weight,
        routed,
        IN: tl.constexpr,
        OUT: tl.constexpr,
        EXPERTS: tl.constexpr,
        EXPERTS_2: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        expert, start, end = find(offsets, tl.program_id(0), EXPERTS, EXPERTS_2, ROWS)
        if expert >= EXPERTS:
            return
        at = start + tl.arange(0, ROWS)
        live = at < end
        col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        held = col < OUT
        k = tl.arange(0, DEPTH)
        left = hidden + tl.where(live, at, start)[:, None].to(tl.int64) * IN + k[None, :]
        within = tl.where(held, col, 0)[None, :] * IN + k[:, None]
        right = weight + expert.to(tl.int64) * OUT * IN + within
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, IN, DEPTH):
            if IN % DEPTH == 0:
                a = tl.load(left + depth)
                b = tl.load(right + depth)
            else:
                inside = k < IN - depth
                a = tl.load(left + depth, mask=inside[None, :], other=0.0)
                b = tl.load(right + depth, mask=inside[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        to = routed + at[:, None].to(tl.int64) * OUT + col[None, :]
        tl.store(to, total.to(routed.dtype.element_ty), mask=live[:, None] & held[None, :])

    @triton.jit
    def sum_routed(  # type: ignore[no-untyped-def]
        routed,
        places,
        weights,
        out,
        SIZE: tl.constexpr,
        TOP_K: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        held = col < SIZE
        total = tl.zeros([COLUMNS], tl.float32)
        for choice in tl.static_range(TOP_K):
            place = tl.load(places + row * TOP_K + choice).to(tl.int64)
            share = tl.load(weights + row * TOP_K + choice)
            part = tl.load(routed + place * SIZE + col, mask=held & (place >= 0), other=0.0)
            # Padding's weight may be NaN.
            total += tl.where(place >= 0, part.to(tl.float32) * share, 0.0)
        tl.store(out + row * SIZE + col, total.to(out.dtype.element_ty), mask=held)

    return _Kernels(sort_routes, routed_up, routed_down, sum_routed)
