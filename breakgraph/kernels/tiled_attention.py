"""Attention of few rows or short sequences, by tiles of rows that a device table names.

A program takes one tile, some new tokens of one request, with the query heads that share one head
of keys. The launch depends on shapes alone: which rows a tile has, and which keys they see, is read
from the table, so a captured launch serves every later batch. A tile without rows returns at once.

Many keys are divided among programs. Each leaves a partial softmax in a workspace, and the last to
end, by a counter, merges them in their order (flash-decoding: Dao et al., 2023).

FlashAttention-3 is built for long sequences: on an H200 in bfloat16, 32 heads of 128 over 8, it
takes 6.5 µs for 16 tokens, 9.6 for 8 requests of 64, 115 for 16 tokens behind 8000. Here they take
4.1, 5.7 and 36 (``benchmarks.bench_attention``), a program starts while the kernel ahead still
runs, and the product behind it loads its weight meanwhile (``launches_early``). Once there are more
programs than processors, FlashAttention-3 is the faster one.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads. On a CPU the op is
the reference, which goes through the table tile by tile.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from breakgraph.kernels.direct_launch import DirectLaunch, Specialization
from breakgraph.kernels.launch import import_triton, launches_early, power_of_two, processors

TILE_QUERIES = 64
"""Queries of a program: rows of its tile, times the heads that share their keys."""

WARPS = 4
LONG_ROWS = 128
BLOCKS = {False: (64, 3), True: (128, 2)}
"""Keys that a program holds at a time and the depth of its pipeline, of fewer rows than
``LONG_ROWS`` and of as many. When they were chosen, before keys were shared, 16 heads over 8 took
for one request of 16, 64, 128, 256 and 512 tokens 3.3, 3.7, 5.0, 7.4 and 13.6 µs by the first and
4.3, 4.6, 4.8, 7.1 and 11.8 by the second; half or twice the queries or warps were slower."""

MOST_SPLITS, PROGRAMS, LEAST_BLOCKS = 16, 256, 4
"""Programs that may share a tile's keys, as long as there are not more of all tiles, and the blocks
that each has at least."""

tl: Any = None  # triton.language, once the kernels are made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "tiled_attention(Tensor q, Tensor k, Tensor v, Tensor tiles, Tensor key_slots, int count, "
    "bool causal, bool long, float scale, Tensor(a!) out, Tensor(b!) parts, Tensor(c!) ended) -> ()"
)


def rows_of_tile(num_heads: int, num_kv_heads: int) -> int:
    """New tokens of one tile."""
    return max(1, TILE_QUERIES // power_of_two(num_heads // num_kv_heads))


def rows_of_wave(num_heads: int, num_kv_heads: int, device: torch.device) -> int:
    """The most new tokens of one request that make no more programs than there are processors."""
    return processors(device) // num_kv_heads * rows_of_tile(num_heads, num_kv_heads)


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    key_slots: torch.Tensor,
    count: int,
    causal: bool,
    long: bool,
    scale: float,
    out: torch.Tensor,
    parts: torch.Tensor,
    ended: torch.Tensor,
) -> None:
    """Write into ``out`` the attention of the rows that ``tiles`` name; others stay as they are.

    Args:
        q: ``[rows, num_heads, head_dim]``, its last dimension dense.
        k: ``[slots, num_kv_heads, head_dim]``, its last dimension dense.
        v: as ``k``.
        tiles: int32 ``[4, room]``, contiguous: the first row of each tile, its rows (at most
            ``rows_of_tile``, 0 for no tile), its request's first entry of ``key_slots``, and how
            many of the keys from there on the first row sees, at least 1.
        key_slots: int32 ``[keys]``, the slot of each key.
        count: leading tiles to look at.
        causal: whether each next row sees one more; otherwise all see as many.
        long: whether sequences are expected to have ``LONG_ROWS`` tokens or more.
        scale: factor on the scores.
        out: as ``q``; it may be ``q`` itself.
        parts: of ``workspace``, as is ``ended``; launches that share them must not overlap.
    """
    torch.ops.breakgraph.tiled_attention(
        q, k, v, tiles, key_slots, count, causal, long, scale, out, parts, ended
    )


def workspace(
    num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs that share a tile leave their parts, float32, and int32 counters of those that
    did, 0 between launches."""
    programs = PROGRAMS if device.type == "cuda" else 1
    queries = rows_of_tile(num_heads, num_kv_heads) * power_of_two(num_heads // num_kv_heads)
    area = queries * (max(16, power_of_two(head_dim)) + 2)
    parts = torch.empty(programs * area, dtype=torch.float32, device=device)
    return parts, torch.zeros(programs, dtype=torch.int32, device=device)


def _on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    key_slots: torch.Tensor,
    count: int,
    causal: bool,
    long: bool,
    scale: float,
    out: torch.Tensor,
    parts: torch.Tensor,
    ended: torch.Tensor,
) -> None:
    groups = q.shape[1] // k.shape[1]
    for row, rows, key, seen in tiles[:, :count].T.tolist():
        if not rows:
            continue
        more = torch.arange(rows if causal else 1)
        slots = key_slots[key : key + seen + len(more) - 1]
        keys = k[slots].float().repeat_interleave(groups, 1)
        values = v[slots].float().repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[row : row + rows].float(), keys) * scale
        hidden = torch.arange(len(slots)) >= seen + more[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[row : row + rows] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)


def tiled_attention_on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    key_slots: torch.Tensor,
    count: int,
    causal: bool,
    long: bool,
    scale: float,
    out: torch.Tensor,
    parts: torch.Tensor,
    ended: torch.Tensor,
) -> None:
    """``tiled_attention`` by Triton."""
    splits = max(1, min(MOST_SPLITS, PROGRAMS // (k.shape[1] * count)))
    special = _specialized(
        *(q.shape[1:], k.shape[1], q.stride(), k.stride(), v.stride(), out.stride()),
        *(tiles.shape[1], scale, causal, long, splits > 1, launches_early(q.device)),
    )
    tensors = (q, k, v, out, tiles, key_slots, parts, ended)
    _kernels().attention_tile((k.shape[1], count, splits), tensors, (), special)


@cache
def _specialized(
    heads: tuple[int, int],
    kv_heads: int,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    room: int,
    scale: float,
    causal: bool,
    long: bool,
    shared: bool,
    early: bool,
) -> Specialization:
    num_heads, head_dim = heads
    groups = num_heads // kv_heads
    block_d = max(16, power_of_two(head_dim))
    sizes = (power_of_two(groups), rows_of_tile(num_heads, kv_heads) * power_of_two(groups))
    scale_log2 = scale * 1.4426950408889634  # the kernel works in powers of two
    block_n, stages = BLOCKS[long]
    block_n = block_n * 128 // max(128, block_d)
    constants = (
        *(*q_strides[:2], *k_strides[:2], *v_strides[:2], *out_strides[:2], room, scale_log2),
        *(causal, groups, head_dim, *sizes, block_n, block_d, LEAST_BLOCKS, shared, early),
    )
    return Specialization(constants, WARPS, stages, early)


_library.impl("tiled_attention", _on_cpu, "CPU")
_library.impl("tiled_attention", tiled_attention_on_cuda, "CUDA")


class _Kernels(NamedTuple):
    attention_tile: DirectLaunch


@cache
def _kernels() -> _Kernels:
    """The Triton kernel; made on first use, because Triton is there only where CUDA is."""
    global tl
    triton, tl = import_triton()

    @triton.jit
    def attention_tile(  # type: ignore[no-untyped-def]
        q, k, v, out, tiles, key_slots, parts, ended,
        Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr,
        V_ROW: tl.constexpr, V_HEAD: tl.constexpr, OUT_ROW: tl.constexpr, OUT_HEAD: tl.constexpr,
        ROOM: tl.constexpr, SCALE_LOG2: tl.constexpr, CAUSAL: tl.constexpr, GROUPS: tl.constexpr,
        HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LEAST: tl.constexpr, SHARED: tl.constexpr,
        EARLY: tl.constexpr,
    ):  # fmt: skip
        kv_head = tl.program_id(0)
        entry = tiles + tl.program_id(1)
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        # A copy wrote the table, and no kernel starts before a copy that is ahead of it has ended.
        first = tl.load(entry)
        rows = tl.load(entry + ROOM)
        slots = key_slots + tl.load(entry + 2 * ROOM)
        seen = tl.load(entry + 3 * ROOM)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if rows == 0:
            return
        query = tl.arange(0, BLOCK_M)
        row = query // BLOCK_G
        head = kv_head * GROUPS + query % BLOCK_G
        dim = tl.arange(0, BLOCK_D)[None, :]
        held = ((row < rows) & (query % BLOCK_G < GROUPS))[:, None] & (dim < HEAD_DIM)
        at = (first + row).to(tl.int64)[:, None]
        queries = tl.load(q + at * Q_ROW + head[:, None] * Q_HEAD + dim, mask=held, other=0.0)
        # Finite, or a part in which a query sees no key would be NaN.
        top = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if CAUSAL:
            end = seen + rows - 1
            limit = seen + row
        else:
            end = seen
            limit = seen + row * 0
        begin = 0
        stop = end
        if SHARED:
            blocks = tl.cdiv(end, BLOCK_N)
            share = tl.cdiv(blocks, tl.minimum(tl.num_programs(2), tl.cdiv(blocks, LEAST)))
            used = tl.cdiv(blocks, share)
            begin = tl.program_id(2) * share * BLOCK_N
            stop = tl.minimum(begin + share * BLOCK_N, end)
            if begin >= end:
                return
        for start in range(begin, stop, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            live = key < end
            slot = tl.load(slots + key, mask=live, other=0).to(tl.int64)
            inside = live[:, None] & (dim < HEAD_DIM)
            where = slot[:, None] * K_ROW + kv_head * K_HEAD + dim
            keys = tl.load(k + where, mask=inside, other=0.0)
            where = slot[:, None] * V_ROW + kv_head * V_HEAD + dim
            values = tl.load(v + where, mask=inside, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE_LOG2
            scores = tl.where(key[None, :] < limit[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(weights, 1)
            mixed = mixed * fade[:, None]
            mixed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            top = new_top
        to = out + at * OUT_ROW + head[:, None] * OUT_HEAD + dim
        alone = True
        if SHARED:
            alone = used == 1
        if alone:
            tl.store(to, (mixed / total[:, None]).to(out.dtype.element_ty), mask=held)
        elif SHARED:
            AREA: tl.constexpr = BLOCK_M * (BLOCK_D + 2)
            this = tl.program_id(1) * tl.num_programs(0) + kv_head
            part = parts + this * tl.num_programs(2) * AREA
            place = query[:, None] * BLOCK_D + dim
            sums = BLOCK_M * BLOCK_D + query
            mine = part + tl.program_id(2) * AREA
            tl.store(mine + place, mixed)
            tl.store(mine + sums, top)
            tl.store(mine + sums + BLOCK_M, total)
            tl.debug_barrier()  # every thread's part is written before the counter says so
            before = tl.atomic_add(ended + this, 1, sem="acq_rel", scope="gpu")
            if before == used - 1:
                tl.store(ended + this, 0)
                peak = tl.load(part + sums, cache_modifier=".cg")
                weight = tl.load(part + sums + BLOCK_M, cache_modifier=".cg")
                whole = tl.load(part + place, cache_modifier=".cg")
                for _other in range(1, used):
                    part += AREA
                    other_peak = tl.load(part + sums, cache_modifier=".cg")
                    other_weight = tl.load(part + sums + BLOCK_M, cache_modifier=".cg")
                    new_peak = tl.maximum(peak, other_peak)
                    fade = tl.exp2(peak - new_peak)
                    gain = tl.exp2(other_peak - new_peak)
                    weight = weight * fade + other_weight * gain
                    whole = whole * fade[:, None]
                    whole += tl.load(part + place, cache_modifier=".cg") * gain[:, None]
                    peak = new_peak
                tl.store(to, (whole / weight[:, None]).to(out.dtype.element_ty), mask=held)

    return _Kernels(attention_tile=DirectLaunch(attention_tile))
