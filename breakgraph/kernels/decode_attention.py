"""Attention of one new token a request over its cached tokens, found through a slot table.

The launch depends on shapes alone: rows, lengths and slots are read from device memory, so a
captured launch serves every later batch. Each request's tokens are divided among a fixed number
of splits by its length on the device; splits past its end return at once. A split's softmax is
partial, and a second kernel merges them (flash-decoding: Dao et al., 2023). Both start while the
kernel ahead still runs, and let the one behind do so (``launches_early``).

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads. On a CPU the op is
the reference over the longest live request.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from breakgraph.kernels.launch import launches_early

MAX_SPLITS = 64
PROGRAMS = 512
"""Programs aimed at, whatever the batch. On an H200 64 requests of 1024 tokens (8 KV heads of 128)
take 68 µs at 512, which needs no merge, and 75 at 1024; 62 is what their bytes take."""

BLOCK_BYTES = 16384
"""Keys of one head that a program holds at a time, and as many values."""

WARPS, STAGES = 4, 3

tl: Any = None  # triton.language, once the kernels are made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot_table, "
    "Tensor request_rows, Tensor seq_lens, float scale, Tensor(a!) out) -> ()"
)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write into ``out`` the attention of each row of ``q`` over its request's tokens.

    Args:
        q: ``[rows, num_heads, head_dim]``, its last dimension dense.
        k_cache: ``[num_slots, num_kv_heads, head_dim]``, with the new tokens stored; contiguous.
        v_cache: as ``k_cache``.
        slot_table: int32 ``[table_rows, context]``, the slot of each token of each request.
        request_rows: int64 ``[rows]``, the row of ``slot_table`` that each row of ``q`` reads.
        seq_lens: int64 ``[rows]``, how much of it, at least 1.
        scale: factor on the scores.
        out: ``[rows, num_heads, head_dim]``, its last dimension dense.
    """
    torch.ops.breakgraph.decode_attention(
        q, k_cache, v_cache, slot_table, request_rows, seq_lens, scale, out
    )


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """``decode_attention`` in plain torch ops of static shapes, over the whole slot table."""
    context, groups = slot_table.shape[1], q.shape[1] // k_cache.shape[1]
    slots = slot_table.index_select(0, request_rows)
    tokens = torch.arange(context, device=q.device)
    live = tokens < seq_lens[:, None]
    slots = torch.where(live, slots, 0).flatten()
    shape = (len(q), context, k_cache.shape[1], q.shape[2])
    keys = k_cache.index_select(0, slots).view(shape).float()
    # What lies behind a request's end may be anything; times a weight of 0, NaN is NaN.
    values = v_cache.index_select(0, slots).view(shape).float()
    values = torch.where(live[:, :, None, None], values, 0.0)
    grouped = q.float().unflatten(1, (-1, groups))
    scores = torch.einsum("bhgd,bchd->bhgc", grouped, keys) * scale
    weights = torch.where(live[:, None, None], scores, float("-inf")).softmax(-1)
    out.copy_(torch.einsum("bhgc,bchd->bhgd", weights, values).flatten(1, 2))


def require_decode_kernel() -> None:
    """Make the CUDA kernels. Raises RuntimeError if Triton is not installed."""
    try:
        _kernels()
    except ImportError as error:
        raise RuntimeError(
            "decode attention on CUDA is a Triton kernel, and triton is not installed: "
            "pip install triton, or decode eagerly with --cuda-graph-backend-decode disabled"
        ) from error


def merge_kernel() -> Any:
    """The kernel that merges the splits; see its launch here for its arguments."""
    return _kernels().merge


def _on_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    longest = slot_table[:, : int(seq_lens.max())]
    decode_attention_reference(q, k_cache, v_cache, longest, request_rows, seq_lens, scale, out)


def _on_cuda(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    kernels = _kernels()
    rows, heads, head_dim = q.shape
    kv_heads, groups = k_cache.shape[1], heads // k_cache.shape[1]
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    block_n = min(128, max(16, BLOCK_BYTES // (block_d * q.element_size())))
    wanted = -(-PROGRAMS // (rows * kv_heads))
    splits = max(1, min(wanted, MAX_SPLITS, -(-slot_table.shape[1] // block_n)))
    # One split needs no merge, and writes its result itself.
    partial = (
        out if splits == 1 else q.new_empty(rows, heads, splits, head_dim, dtype=torch.float32)
    )
    lse = q.new_empty(rows, heads, splits, dtype=torch.float32)
    early = launches_early(q.device)
    shapes = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_N": block_n, "EARLY": early}
    how = {"launch_pdl": True} if early else {}
    kernels.split[(rows, kv_heads, splits)](
        *(q, k_cache, v_cache, slot_table, request_rows, seq_lens, partial, lse),
        scale * 1.4426950408889634,  # log2(e): the kernels work in powers of two
        splits,
        *(q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), slot_table.stride(0)),
        *(out.stride(0), out.stride(1)),
        GROUPS=groups,
        BLOCK_H=max(16, 1 << (groups - 1).bit_length()),
        DIRECT=splits == 1,
        num_warps=WARPS,
        num_stages=STAGES,
        **(shapes | how),
    )
    if splits > 1:
        kernels.merge[(rows, heads)](
            *(partial, lse, seq_lens, out, splits, out.stride(0), out.stride(1)),
            num_warps=2,
            **(shapes | how),
        )


_library.impl("decode_attention", _on_cpu, "CPU")
_library.impl("decode_attention", _on_cuda, "CUDA")


@cache
def _kernels() -> SimpleNamespace:
    """The Triton kernels; made on first use, because Triton is there only where CUDA is."""
    global tl
    import triton
    import triton.language

    tl = triton.language

    @triton.jit(do_not_specialize=["splits"])
    def split(  # type: ignore[no-untyped-def]
        q,
        k_cache,
        v_cache,
        slot_table,
        request_rows,
        seq_lens,
        partial,
        lse,
        scale_log2,
        splits,
        q_row,
        q_head,
        cache_slot,
        cache_head,
        table_row,
        out_row,
        out_head,
        GROUPS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        DIRECT: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        row = tl.program_id(0)
        kv_head = tl.program_id(1)
        at = tl.program_id(2)
        length = tl.load(seq_lens + row).to(tl.int32)
        share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
        begin = at * share
        if begin >= length:
            return
        end = tl.minimum(begin + share, length)
        slots = slot_table + tl.load(request_rows + row) * table_row

        group = tl.arange(0, BLOCK_H)
        dim = tl.arange(0, BLOCK_D)
        heads = kv_head * GROUPS + group
        held = (group < GROUPS)[:, None] & (dim < HEAD_DIM)[None, :]
        queries = tl.load(
            q + row.to(tl.int64) * q_row + heads[:, None] * q_head + dim[None, :],
            mask=held,
            other=0.0,
        )
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        mixed = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            live = token < end
            slot = tl.load(slots + token, mask=live, other=0).to(tl.int64)
            where = slot * cache_slot + kv_head * cache_head
            inside = live[:, None] & (dim < HEAD_DIM)[None, :]
            keys = tl.load(k_cache + where[:, None] + dim[None, :], mask=inside, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2
            scores = tl.where(live[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(weights, 1)
            values = tl.load(v_cache + where[:, None] + dim[None, :], mask=inside, other=0.0)
            mixed = mixed * fade[:, None]
            mixed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            top = new_top

        mixed = mixed / total[:, None]
        if DIRECT:
            to = partial + row.to(tl.int64) * out_row + heads[:, None] * out_head + dim[None, :]
            tl.store(to, mixed.to(partial.dtype.element_ty), mask=held)
        else:
            part = (row * tl.num_programs(1) * GROUPS + heads) * splits + at
            tl.store(partial + part[:, None] * HEAD_DIM + dim[None, :], mixed, mask=held)
            tl.store(lse + part, top + tl.log2(total), mask=group < GROUPS)

    @triton.jit(do_not_specialize=["splits"])
    def merge(  # type: ignore[no-untyped-def]
        partial,
        lse,
        seq_lens,
        out,
        splits,
        out_row,
        out_head,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        row = tl.program_id(0)
        head = tl.program_id(1)
        length = tl.load(seq_lens + row).to(tl.int32)
        blocks = tl.cdiv(length, BLOCK_N)
        used = tl.cdiv(blocks, tl.cdiv(blocks, splits))  # the others wrote nothing
        dim = tl.arange(0, BLOCK_D)
        first = (row * tl.num_programs(1) + head) * splits
        top = float("-inf")
        total = 0.0
        mixed = tl.zeros([BLOCK_D], tl.float32)
        for at in range(used):
            weight = tl.load(lse + first + at)
            part = tl.load(partial + (first + at) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
            new_top = tl.maximum(top, weight)
            fade = tl.exp2(top - new_top)
            share = tl.exp2(weight - new_top)
            mixed = mixed * fade + part * share
            total = total * fade + share
            top = new_top
        to = out + row.to(tl.int64) * out_row + head * out_head + dim
        tl.store(to, (mixed / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)

    return SimpleNamespace(split=split, merge=merge)
