"""Attention over some of the keys, with the log-sum-exp that lets the rest be merged in.

``exp(lse)`` is the denominator of a part's softmax, so parts over disjoint keys merge exactly:
each weighs by its share of the sum of all denominators. Results and sums are float32 whatever the
dtype of the operands, so that many parts lose no more than one.
"""

from __future__ import annotations

import torch

MAX_SCORES = 1 << 24
"""Scores held at a time, 64 MiB of float32; queries are taken in blocks that keep to it."""


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence in plain torch ops.

    Args:
        q: ``[num_queries, num_heads, head_dim]``.
        k: ``[num_keys, num_heads, head_dim]``, at least one key.
        v: ``[num_keys, num_heads, value_dim]``.
        scale: factor on the scores.
        causal: query ``i`` sees keys ``0`` to ``i`` alone; there are as many keys as queries.

    Returns:
        float32 ``[num_queries, num_heads, value_dim]`` and the natural log-sum-exp of the scores,
        float32 ``[num_queries, num_heads]``.
    """
    count, heads, num_keys = len(q), q.shape[1], len(k)
    out = q.new_empty(count, heads, v.shape[2], dtype=torch.float32)
    lse = q.new_empty(count, heads, dtype=torch.float32)
    queries, keys, values = q.transpose(0, 1), k.permute(1, 2, 0), v.transpose(0, 1)
    step = max(1, MAX_SCORES // (heads * num_keys))
    for start in range(0, count, step):
        end = min(start + step, count)
        seen = end if causal else num_keys
        scores = _float32_products(queries[:, start:end], keys[:, :, :seen]).mul_(scale)
        if causal:
            later = torch.ones(end - start, seen, dtype=torch.bool, device=q.device).triu(start + 1)
            scores.masked_fill_(later, float("-inf"))
        total = scores.logsumexp(-1)
        weights = scores.sub_(total.unsqueeze(-1)).exp_().to(v.dtype)
        out[start:end] = torch.bmm(weights, values[:, :seen]).transpose(0, 1)
        lse[start:end] = total.t()
    return out, lse


def merge_attention_(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Merge attention over further keys into ``out`` and ``lse``, in place.

    Args:
        out: float32 ``[rows, num_heads, value_dim]``.
        lse: float32 ``[rows, num_heads]``.
        part: as ``out``, of any floating dtype.
        part_lse: as ``lse``.
    """
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.addcmul_(part.to(out.dtype), (part_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


def _float32_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of batches, summed and given in float32."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
