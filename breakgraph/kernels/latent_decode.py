"""Attention of one new token a request over cached latent rows, found through a slot table.

Absorbed latent attention has one key head that all query heads share, and its values are the
first elements of its keys: a row of the cache is read once for both. Shapes alone decide the
launch: rows, lengths and slots are read from device memory, so a capture serves every later
batch. Each request's tokens are divided among a fixed number of splits by its length on the
device, and a second kernel merges them, as in ``decode_attention``.

The kernel of grouped-query attention does not fit here: it holds all query heads of a key head and
the keys apart from the values, and 128 heads of 576 elements, padded to 1024, are 256 KiB of
bfloat16 alone. This one holds 16 heads, and latents and rotated elements as two products.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads. On a CPU the op is
the reference over the longest live request.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from breakgraph.kernels.decode_attention import MAX_SPLITS, PROGRAMS, merge_kernel
from breakgraph.kernels.launch import power_of_two

BLOCK_HEADS, WARPS, STAGES = 16, 4, 2
"""Query heads of a program, the fewest that a matrix product takes: its sums, 16 x 512 in float32,
are 64 registers of each thread."""

BLOCK_BYTES = 32768
"""Latents that a program holds at a time; two stages of them, and the queries, are 80 KiB of shared
memory for DeepSeek-V3."""

CHUNK_ROWS = 1 << 15
"""Latent rows that the reference gathers at a time, over all requests: 72 MiB of float32 for 576
elements."""

tl: Any = None  # triton.language, once the kernel is made

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "latent_decode_attention(Tensor q, Tensor latents, Tensor slot_table, Tensor request_rows, "
    "Tensor seq_lens, float scale, Tensor(a!) out) -> ()"
)


def latent_decode_attention(
    q: torch.Tensor,
    latents: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write into ``out`` the attention of each row of ``q`` over its request's latent rows.

    Args:
        q: ``[rows, num_heads, row_dim]``.
        latents: ``[num_slots, 1, row_dim]``, with the new tokens stored.
        slot_table: int32 ``[table_rows, context]``, the slot of each token of each request.
        request_rows: int64 ``[rows]``, the row of ``slot_table`` that each row of ``q`` reads.
        seq_lens: int64 ``[rows]``, how much of it, at least 1.
        scale: factor on the scores.
        out: ``[rows, num_heads, value_dim]``; the values are the first ``value_dim`` elements of
            the latent rows.
    """
    torch.ops.breakgraph.latent_decode_attention(
        q, latents, slot_table, request_rows, seq_lens, scale, out
    )


def latent_decode_attention_reference(
    q: torch.Tensor,
    latents: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """``latent_decode_attention`` in plain torch ops of static shapes, over the whole table."""
    count, value_dim, context = len(q), out.shape[2], slot_table.shape[1]
    queries = q.float() * scale
    top = queries.new_full((count, q.shape[1], 1), float("-inf"))
    total = torch.zeros_like(top)
    mixed = queries.new_zeros(out.shape)
    step = max(1, CHUNK_ROWS // count)
    for start in range(0, context, step):
        end = min(start + step, context)
        live = torch.arange(start, end, device=q.device) < seq_lens[:, None]
        slots = slot_table[:, start:end].index_select(0, request_rows)
        slots = torch.where(live, slots, 0).flatten()
        rows = latents.index_select(0, slots).view(count, end - start, -1).float()
        # What lies in slot 0 may be anything; times a weight of 0, NaN is NaN.
        rows = torch.where(live.unsqueeze(-1), rows, 0.0)
        scores = torch.bmm(queries, rows.mT).masked_fill_(~live.unsqueeze(1), float("-inf"))
        # The first chunk holds a live token of every request, so that the maximum is finite.
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, fade = (scores - new_top).exp_(), (top - new_top).exp_()
        total = total * fade + weights.sum(-1, keepdim=True)
        mixed = mixed * fade + torch.bmm(weights, rows[..., :value_dim])
        top = new_top
    out.copy_(mixed / total)


def _on_cpu(
    q: torch.Tensor,
    latents: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    longest = slot_table[:, : int(seq_lens.max())]
    latent_decode_attention_reference(q, latents, longest, request_rows, seq_lens, scale, out)


def _on_cuda(
    q: torch.Tensor,
    latents: torch.Tensor,
    slot_table: torch.Tensor,
    request_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    rows, heads, row_dim = q.shape
    rank = out.shape[2]
    block_d = max(16, power_of_two(rank))
    block_n = min(64, max(16, BLOCK_BYTES // (block_d * q.element_size())))
    head_blocks = -(-heads // BLOCK_HEADS)
    wanted = -(-PROGRAMS // (rows * head_blocks))
    splits = max(1, min(wanted, MAX_SPLITS, -(-slot_table.shape[1] // block_n)))
    # One split needs no merge, and writes its result itself.
    partial = out if splits == 1 else q.new_empty(rows, heads, splits, rank, dtype=torch.float32)
    lse = q.new_empty(rows, heads, splits, dtype=torch.float32)
    _split_kernel()[(rows, head_blocks, splits)](
        *(q, latents, slot_table, request_rows, seq_lens, partial, lse),
        scale * 1.4426950408889634,  # log2(e): the kernels work in powers of two
        splits,
        *(q.stride(0), q.stride(1), latents.stride(0), slot_table.stride(0)),
        *(out.stride(0), out.stride(1)),
        HEADS=heads,
        RANK=rank,
        ROPE=row_dim - rank,
        BLOCK_H=BLOCK_HEADS,
        BLOCK_D=block_d,
        BLOCK_R=max(16, power_of_two(row_dim - rank)),
        BLOCK_N=block_n,
        DIRECT=splits == 1,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if splits > 1:
        merge_kernel()[(rows, heads)](
            *(partial, lse, seq_lens, out, splits, out.stride(0), out.stride(1)),
            HEAD_DIM=rank,
            BLOCK_D=block_d,
            BLOCK_N=block_n,
            EARLY=False,
            num_warps=2,
        )


_library.impl("latent_decode_attention", _on_cpu, "CPU")
_library.impl("latent_decode_attention", _on_cuda, "CUDA")


@cache
def _split_kernel() -> Any:
    """The Triton kernel; made on first use, because Triton is there only where CUDA is."""
    global tl
    import triton
    import triton.language

    tl = triton.language

    @triton.jit(do_not_specialize=["splits"])
    def split(  # type: ignore[no-untyped-def]
        q,
        latents,
        slot_table,
        request_rows,
        seq_lens,
        partial,
        lse,
        scale_log2,
        splits,
        q_row,
        q_head,
        latent_slot,
        table_row,
        out_row,
        out_head,
        HEADS: tl.constexpr,
        RANK: tl.constexpr,
        ROPE: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_N: tl.constexpr,
        DIRECT: tl.constexpr,
    ):
        row = tl.program_id(0)
        at = tl.program_id(2)
        length = tl.load(seq_lens + row).to(tl.int32)
        share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
        begin = at * share
        if begin >= length:
            return
        end = tl.minimum(begin + share, length)
        slots = slot_table + tl.load(request_rows + row) * table_row

        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        dim = tl.arange(0, BLOCK_D)
        rope = tl.arange(0, BLOCK_R)
        held = (head < HEADS)[:, None] & (dim < RANK)[None, :]
        turned = (head < HEADS)[:, None] & (rope < ROPE)[None, :]
        begins = q + row.to(tl.int64) * q_row + head[:, None] * q_head
        queries = tl.load(begins + dim[None, :], mask=held, other=0.0)
        rope_queries = tl.load(begins + RANK + rope[None, :], mask=turned, other=0.0)
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        mixed = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            live = token < end
            slot = tl.load(slots + token, mask=live, other=0).to(tl.int64)
            where = latents + slot[:, None] * latent_slot
            inside = live[:, None] & (dim < RANK)[None, :]
            cached = tl.load(where + dim[None, :], mask=inside, other=0.0)
            inside = live[:, None] & (rope < ROPE)[None, :]
            rope_keys = tl.load(where + RANK + rope[None, :], mask=inside, other=0.0)
            scores = tl.dot(queries, tl.trans(cached), input_precision="ieee")
            scores += tl.dot(rope_queries, tl.trans(rope_keys), input_precision="ieee")
            scores = tl.where(live[None, :], scores * scale_log2, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(weights, 1)
            mixed = mixed * fade[:, None]
            mixed += tl.dot(weights.to(cached.dtype), cached, input_precision="ieee")
            top = new_top

        mixed = mixed / total[:, None]
        if DIRECT:
            to = partial + row.to(tl.int64) * out_row + head[:, None] * out_head + dim[None, :]
            tl.store(to, mixed.to(partial.dtype.element_ty), mask=held)
        else:
            part = (row * HEADS + head) * splits + at
            tl.store(partial + part[:, None] * RANK + dim[None, :], mixed, mask=held)
            tl.store(lse + part, top + tl.log2(total), mask=head < HEADS)

    return split
