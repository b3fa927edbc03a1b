"""Mamba-2's scan by matrix products, to train NemotronH without a further package.

It computes what transformers' ``mamba2_chunk_scan`` does, from the same arguments, but keeps no
state: rows start empty and no state is returned. So it stands in for training only; generation
runs transformers' own code. That code, where the ``mamba-ssm`` package is absent, makes tensors
of [rows, chunks, chunk, chunk, heads, state] elements in transformers 5.17: 8.6 GB each for a
batch of 65,536 tokens in chunks of 64, with 8 heads and 64 states. The largest one here has no
last dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers.models.nemotron_h import modeling_nemotron_h


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    **_: Any,
) -> torch.Tensor:
    """The scan in chunks, after Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060), section 6.

    Args:
        x: [rows, length, heads, head_dim].
        dt: [rows, length, heads], before its bias and softplus.
        decay: [heads], negative; transformers calls it A.
        b, c: [rows, length, groups, state].
        D, dt_bias: [heads].

    Returns:
        [rows, length, heads, head_dim]. Sums of decays are float32, products in the type of ``x``.
    """
    rows, length, heads, dim = x.shape
    groups = b.shape[2]
    per_group = heads // groups
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    chunks = -(-length // chunk_size)
    pad = chunks * chunk_size - length

    def chunked(tensor: torch.Tensor, *last: int) -> torch.Tensor:
        """[rows, length, ...] to [rows, chunks, groups, ..., chunk_size, last]; zeros behind."""
        tensor = F.pad(tensor.flatten(2), (0, 0, 0, pad))
        tensor = tensor.view(rows, chunks, chunk_size, groups, *last)
        return tensor.permute(0, 1, 3, *range(4, 3 + len(last)), 2, 3 + len(last))

    v = chunked((x * dt[..., None]).to(x.dtype), per_group, dim)
    key, query = chunked(b, b.shape[-1])[:, :, :, None], chunked(c, c.shape[-1])[:, :, :, None]
    sums = chunked(dt * decay.float(), per_group, 1).squeeze(-1).cumsum(-1)
    # within a chunk: masked attention, each score times the decay between its two positions
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()
    y = ((query @ key.mT) * between.to(x.dtype)) @ v
    # what a chunk adds to the state, and the state before each chunk
    to_end = (sums[..., -1:] - sums).exp().to(x.dtype)
    added = (key * to_end[..., None]).mT @ v
    state, before = torch.zeros_like(added[:, 0], dtype=torch.float32), []
    for chunk in range(chunks):
        before.append(state.to(x.dtype))
        state = state * sums[:, chunk, :, :, -1, None, None].exp() + added[:, chunk]
    y = y + (query * sums.exp().to(x.dtype)[..., None]) @ torch.stack(before, dim=1)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(rows, chunks * chunk_size, heads, dim)[:, :length]
    return y + x * D[:, None]


@contextmanager
def matrix_product_scan() -> Iterator[None]:
    """Let transformers' NemotronH call :func:`chunk_scan` in here."""
    with patch.object(modeling_nemotron_h, "mamba2_chunk_scan", chunk_scan):
        yield
