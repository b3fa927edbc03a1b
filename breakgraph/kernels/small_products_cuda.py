"""The CUDA side of ``small_products``: one Triton kernel, its tiles and its launches.

A program holds a tile of the weight's rows and all rows of the input, so each byte of the weight
is read once, and the matrix units take the weight as their left operand: the few rows fill their
narrow side. Where the tiles are too few for the chip the depth is divided among programs; the last
of them to end, by a counter, adds the parts up in a fixed order.

A launch is early (``launches_early``), and most tiles load the weight's first block before they
wait for the kernel ahead. Counters and parts are touched after that, so one stream orders them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from breakgraph.kernels.launch import import_triton, launches_early, processors


class Tile(NamedTuple):
    """What a program holds.

    Attributes:
        rows, columns, depth: of the input, the weight and both.
        stages: pipeline stages.
        ahead: whether the weight's first block is loaded before the kernel ahead has ended.
        resident: programs that a multiprocessor's shared memory has room for.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    ahead: bool
    resident: int


TILES = (
    Tile(16, 64, 128, 4, ahead=True, resident=2),
    Tile(16, 64, 128, 3, ahead=False, resident=3),
    Tile(32, 64, 128, 4, ahead=True, resident=1),
    Tile(32, 64, 128, 4, ahead=False, resident=2),
    Tile(32, 64, 128, 3, ahead=False, resident=3),
)
GATED_TILES = (
    Tile(16, 64, 128, 3, ahead=True, resident=1),
    Tile(32, 64, 128, 3, ahead=False, resident=1),
)
"""The first that has the rows, and whose programs are all resident at once, is taken.

On an H200 in bfloat16, a norm and a product of 16 rows (cuBLAS's in brackets), in µs: of Qwen3-0.6B
q, k, v 5.8 (6.3), output 6.4 (7.1), gate, up and activation 7.3 (7.7), down 6.9 (7.7); of
Qwen3-8B 17.2 (17.8), 12.6 (13.8), 52.4 at best (51.6), so cuBLAS's, and 29.7 (30.6). Of 32 rows
5.4 (6.4), 6.4 (7.0), 7.6 (7.9) and 7.2 (7.7); 17.2 (18.0), 13.1 (14.4), 54 (52.2) and 31.4 (31.8).
Of 64 rows cuBLAS's are faster."""

WARPS = 4
ROW_CLASSES = tuple(sorted({tile.rows for tile in TILES}))
MAX_ROWS = ROW_CLASSES[-1]
DEPTH_MULTIPLE = max(tile.depth for tile in TILES)

FEW_STEPS, STEPS = 3, 8
"""Blocks of depth that a program has at least, where there are tiles for less than a third of the
multiprocessors, and where for more: 64 tiles of 8 blocks take 5.8 µs whole, 6.4 in halves; 16 of
16 take 7.2 whole and 6.4 in fifths."""

ACTIVATIONS = {"none": 0, "silu_mul": 1, "relu_squared": 2}

tl: Any = None  # triton.language, once the kernel is made


def gains(weight: torch.Tensor, activation: str) -> bool:
    """Whether ``weight``, on CUDA, is one that the kernel takes and is faster with."""
    if not (
        launches_early(weight.device)
        and weight.dtype.itemsize == 2
        and weight.is_contiguous()
        and weight.shape[1] % DEPTH_MULTIPLE == 0
        and weight.numel() < 2**31
    ):
        return False
    widest = GATED_TILES[0].columns * GATED_TILES[0].resident * processors(weight.device)
    return activation != "silu_mul" or weight.shape[0] <= 2 * widest


def small_product_on_cuda(
    x: torch.Tensor, weight: torch.Tensor, activation: str, normed_eps: float | None
) -> torch.Tensor:
    """``small_product`` by Triton."""
    features = weight.shape[0] // (2 if activation == "silu_mul" else 1)
    out = x.new_empty(len(x), features)
    _launch(x, weight, out, ACTIVATIONS[activation], add=False, normed_eps=normed_eps)
    return out


def add_small_product_on_cuda(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, keep: bool
) -> None:
    """``add_small_product`` by Triton."""
    _launch(x, weight, residual, ACTIVATIONS["none"], add=keep)


def plan_of(
    rows: int, features: int, size: int, *, gated: bool, processors: int
) -> tuple[Tile, int]:
    """The tile of a product of ``rows`` up to ``MAX_ROWS``, and the programs that share its depth.

    Args:
        rows: of the input.
        features: of the result.
        size: what is summed over.
        gated: whether the weight has a gate's rows too.
        processors: multiprocessors of the device.
    """
    table = GATED_TILES if gated else TILES
    held = next(held for held in ROW_CLASSES if held >= rows)
    for tile in (tile for tile in table if tile.rows == held):
        tiles, room = -(-features // tile.columns), tile.resident * processors
        if tiles <= room:
            break
    steps = size // tile.depth
    least = FEW_STEPS if 3 * tiles < processors else STEPS
    return tile, max(1, min(room // tiles, steps // least))


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    activation: int,
    *,
    add: bool,
    normed_eps: float | None = None,
) -> None:
    """The product into ``out``, or added to it."""
    (rows, size), features = x.shape, out.shape[1]
    if not out.numel():
        return
    gated, normed, device = activation == ACTIVATIONS["silu_mul"], normed_eps is not None, x.device
    tile, splits = plan_of(rows, features, size, gated=gated, processors=processors(device))
    tiles, each = -(-features // tile.columns), -(-size // (tile.depth * splits)) * tile.depth
    splits = -(-size // each)
    parts = counters = _counters(device)
    if splits > 1:
        held = tile.rows * (tile.columns * (2 if gated else 1) + normed)
        parts = x.new_empty(tiles * splits * held, dtype=torch.float32)
    _kernel()[(tiles, splits)](
        *(x, weight, out, parts, counters, rows, x.stride(0), size, features, out.stride(0), each),
        ACTIVATION=activation,
        ADD=add,
        NORM=normed,
        EPS=normed_eps or 0.0,
        SPLIT=splits > 1,
        AHEAD=tile.ahead,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=WARPS,
        num_stages=tile.stages,
        launch_pdl=True,
    )


@cache
def _counters(device: torch.device) -> torch.Tensor:
    """How many programs of a tile have ended: 0 between launches, which one stream orders."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first small product ran inside a capture, in whose memory its counters cannot "
            "stay; run one before"
        )
    most = max(tile.resident for tile in TILES) * processors(device)
    return torch.zeros(most, dtype=torch.int32, device=device)


@cache
def _kernel() -> Any:
    """The Triton kernel; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit
    def sum_of_squares(x):  # type: ignore[no-untyped-def]
        wide = x.to(tl.float32)
        return tl.sum(wide * wide, 0)

    @triton.jit
    def finish(  # type: ignore[no-untyped-def]
        first, second, squares, out, row, col, rows, size, features, out_row,
        ACTIVATION: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    ):  # fmt: skip
        dtype = out.dtype.element_ty
        if NORM:
            factor = tl.rsqrt(squares / size + EPS)[None, :]
            first, second = first * factor, second * factor
        held = (row < rows) & (col < features)
        at = out + row.to(tl.int64) * out_row + col
        if ACTIVATION == 1:
            wide = first.to(dtype).to(tl.float32)
            active = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
            first = active * second.to(dtype).to(tl.float32)
        if ACTIVATION == 2:
            first = first.to(dtype).to(tl.float32)
            first = tl.where(first < 0, 0.0, first)  # keeps NaN, as relu does
            first = first * first
        if ADD:
            first += tl.load(at, mask=held, other=0.0).to(tl.float32)
        tl.store(at, first.to(dtype), mask=held)

    @triton.jit(do_not_specialize=["rows"])
    def product(  # type: ignore[no-untyped-def]
        x, weight, out, parts, counters, rows, x_row, size, features, out_row, each,
        ACTIVATION: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
        SPLIT: tl.constexpr, AHEAD: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """One tile of weight rows times all rows, over one part of the depth."""
        tl.extra.cuda.gdc_launch_dependents()
        tile, split = tl.program_id(0), tl.program_id(1)
        row = tl.arange(0, ROWS)
        col = tile * COLUMNS + tl.arange(0, COLUMNS)
        k = split * each + tl.arange(0, DEPTH)
        within = tl.where(col < features, col, 0).to(tl.int64) * size
        left = weight + within[:, None] + k[None, :]
        right = x + tl.where(row < rows, row, 0).to(tl.int64)[None, :] * x_row + k[:, None]
        gap = features * size
        # The weight is there before the kernel ahead has ended; its output, x, is not. What comes
        # early waits in registers while the other steps are multiplied.
        if AHEAD:
            early = tl.load(left)
            if ACTIVATION == 1:
                early_up = tl.load(left + gap)
        tl.extra.cuda.gdc_wait()
        start = split * each
        if AHEAD:
            beside = tl.load(right)
            left += DEPTH
            right += DEPTH
            start += DEPTH
        first = tl.zeros([COLUMNS, ROWS], tl.float32)
        second = tl.zeros([COLUMNS, ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for _step in range(start, tl.minimum(split * each + each, size), DEPTH):
            a = tl.load(left)
            b = tl.load(right)
            first = tl.dot(a, b, first)
            if ACTIVATION == 1:
                second = tl.dot(tl.load(left + gap), b, second)
            if NORM:
                squares += sum_of_squares(b)
            left += DEPTH
            right += DEPTH
        if AHEAD:
            first = tl.dot(early, beside, first)
            if ACTIVATION == 1:
                second = tl.dot(early_up, beside, second)
            if NORM:
                squares += sum_of_squares(beside)
        if SPLIT:
            AREA: tl.constexpr = COLUMNS * ROWS
            AREAS: tl.constexpr = 2 * AREA if ACTIVATION == 1 else AREA
            STRIDE: tl.constexpr = AREAS + ROWS if NORM else AREAS
            splits = tl.num_programs(1)
            place = tl.arange(0, COLUMNS)[:, None] * ROWS + row[None, :]
            whole = parts + (tile * splits).to(tl.int64) * STRIDE
            base = whole + place
            base_squares = whole + AREAS + row
            tl.store(base + split * STRIDE, first)
            if NORM:
                tl.store(base_squares + split * STRIDE, squares)
            if ACTIVATION == 1:
                tl.store(base + split * STRIDE + AREA, second)
            tl.debug_barrier()  # every thread's part is written before the counter says so
            ended = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
            if ended == splits - 1:
                tl.store(counters + tile, 0)
                total = tl.load(base, cache_modifier=".cg")
                other = total
                if ACTIVATION == 1:
                    other = tl.load(base + AREA, cache_modifier=".cg")
                if NORM:
                    squares = tl.load(base_squares, cache_modifier=".cg")
                for part in range(1, splits):
                    total += tl.load(base + part * STRIDE, cache_modifier=".cg")
                    if ACTIVATION == 1:
                        other += tl.load(base + part * STRIDE + AREA, cache_modifier=".cg")
                    if NORM:
                        squares += tl.load(base_squares + part * STRIDE, cache_modifier=".cg")
                finish(
                    total, other, squares, out, row[None, :], col[:, None],
                    rows, size, features, out_row, ACTIVATION, ADD, NORM, EPS,
                )  # fmt: skip
        else:
            finish(
                first, second, squares, out, row[None, :], col[:, None],
                rows, size, features, out_row, ACTIVATION, ADD, NORM, EPS,
            )  # fmt: skip

    return product
