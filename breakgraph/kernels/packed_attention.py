"""Attention of packed sequences whose lengths lie in device memory, so that a graph can hold it.

A launch depends on the rows and on the number of sequence slots alone: where each sequence begins
and ends is read from ``cu_seqlens`` on the device. A slot past the last sequence is empty. Rows
past the last sequence are padding; they are written as well, with finite numbers, or what the
graph's memory held before would flow on through them.

These are ``torch.library`` ops, so that a capture, which refuses attention with frozen lengths,
sees that this is none, and audits what it reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int? left, "
    "int? right, Tensor(a!) out) -> ()"
)
_library.define(
    "packed_flash_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor is_token, "
    "Tensor zero, float scale, int? left, int? right, Tensor(a!) out) -> ()"
)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    out: torch.Tensor,
) -> None:
    """Write each sequence's attention over itself into ``out``: any device, any dtype.

    Every row looks at every row, so the work is that of one sequence of all rows without a mask;
    padding is a sequence more.

    Args:
        q: ``[rows, num_heads, head_dim]``.
        k: ``[rows, num_kv_heads, head_dim]``.
        v: as ``k``.
        cu_seqlens: int32 ``[slots + 1]``, where each sequence begins and ends, from 0 on; a slot
            past the last sequence ends where that does.
        scale: factor on the scores.
        left: most tokens before its own that a query sees; None for all.
        right: most tokens after its own; None for all.
        out: ``[rows, num_heads, head_dim]``.
    """
    torch.ops.breakgraph.packed_attention(q, k, v, cu_seqlens, scale, left, right, out)


def packed_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    is_token: torch.Tensor,
    zero: torch.Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    out: torch.Tensor,
) -> None:
    """As ``packed_attention``, by the FlashAttention-2 that torch carries; padding is zero.

    Slots that are empty, and blocks of queries past a sequence's end, return at once.

    Args:
        is_token: bool ``[rows, 1, 1]``, False for padding.
        zero: of the dtype of ``out``, a scalar. With it the copy into ``out`` is the one launch
            that also clears padding.
    """
    torch.ops.breakgraph.packed_flash_attention(
        q, k, v, cu_seqlens, is_token, zero, scale, left, right, out
    )


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    out: torch.Tensor,
) -> None:
    rows = torch.arange(len(q), dtype=cu_seqlens.dtype, device=q.device)
    sequence = torch.bucketize(rows, cu_seqlens[1:], right=True)
    before = rows.unsqueeze(1) - rows
    seen = sequence.unsqueeze(1) == sequence
    if right is not None:
        seen &= before >= -right
    if left is not None:
        seen &= before <= left
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=seen,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out.copy_(mixed.squeeze(0).transpose(0, 1))


def _plain_as_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    is_token: torch.Tensor,
    zero: torch.Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    out: torch.Tensor,
) -> None:
    _plain(q, k, v, cu_seqlens, scale, left, right, out)
    out.copy_(torch.where(is_token, out, zero))


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    is_token: torch.Tensor,
    zero: torch.Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    out: torch.Tensor,
) -> None:
    # No sequence is longer than all rows. One row would take the path of a decode, which wants
    # as many rows as slots.
    longest = max(2, len(q))
    mixed = torch.ops.aten._flash_attention_forward.default(
        *(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, right == 0, False),
        scale=scale,
        window_size_left=left,
        window_size_right=None if right == 0 else right,
    )[0]
    torch.where(is_token, mixed, zero, out=out)


_library.impl("packed_attention", _plain, "CPU")
_library.impl("packed_attention", _plain, "CUDA")
_library.impl("packed_flash_attention", _plain_as_flash, "CPU")
_library.impl("packed_flash_attention", _flash, "CUDA")
