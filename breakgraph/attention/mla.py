"""Multi-head latent attention: a token is cached as one row, and serves as keys and values of
all heads.

The row is the normalised latent and the rotated part of the key, shared by the heads. Making it,
its store and the keys and values of the new tokens are token-wise, so they are captured; the break
attends to the new tokens and to cached rows in whichever way the live batch's lengths ask for. A
decode is absorbed into the latent space and captured whole (Liu et al., 2024, DeepSeek-V2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from breakgraph.attention.latent_plan import LatentShape
from breakgraph.attention.layer import Attention
from breakgraph.distributed import Shard
from breakgraph.forward import get_forward_context
from breakgraph.layers.linear import CheckpointSlot, row_slot, weight_parameter


class LatentAttention(Attention):
    """Attention over latent rows, and the projection from them to keys and values.

    To the KV pool it is one key head of ``shape.row_dim`` elements without values of its own:
    ``k_cache: [num_slots, 1, row_dim]``. The projection is ``kv_b_proj`` of the checkpoint.

    Args:
        shape: its sizes, with the heads of this rank.
        heads: which of the checkpoint's heads those are.
        scale: factor on the scores.
    """

    def __init__(self, shape: LatentShape, heads: Shard, *, scale: float) -> None:
        super().__init__(
            num_heads=shape.num_heads, num_kv_heads=1, head_dim=shape.row_dim, scale=scale
        )
        self.shape, self._heads = shape, heads
        self.up = weight_parameter(shape.num_heads, shape.nope_dim + shape.value_dim, shape.rank)

    def checkpoint_slots(self) -> dict[str, CheckpointSlot]:
        """By checkpoint name beside this module: the heads one after the other."""
        rows = self.up.detach().flatten(0, 1)
        return {"kv_b_proj.weight": row_slot(rows, self._heads.of(self.up.shape[1]))}

    def forward(  # type: ignore[override]
        self, q: torch.Tensor, latent: torch.Tensor, out_cache_loc: torch.Tensor
    ) -> torch.Tensor:
        """Store the rows of the new tokens and attend over them and the cached ones.

        Args:
            q: ``[rows, num_heads, qk_dim]``, the rotated elements last.
            latent: ``[rows, row_dim]``, the rotated elements last.
            out_cache_loc: int64 ``[rows]``, the slot of each row; 0 for padding.

        Returns:
            ``[rows, num_heads, value_dim]``; padded rows are zero, or attend to slot 0.
        """
        shape, backend = self.shape, get_forward_context().attn_backend
        cached = latent.unsqueeze(1)
        self.k_cache.index_copy_(0, out_cache_loc, cached)
        if backend.capturable:
            mixed = q.new_empty(len(q), shape.num_heads, shape.rank)
            backend.forward(self, self.absorb(q), cached, cached[..., : shape.rank], mixed)
            return self.values_of(mixed)
        k, v = self.expand(latent, pad=backend.equal_head_dims)
        out = q.new_zeros(len(q), shape.num_heads, shape.value_dim)
        self.mix(q, k, v, out)
        return out

    def expand(self, latent: torch.Tensor, *, pad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all heads.

        Args:
            latent: ``[n, row_dim]``.
            pad: append zeros to the values until they are as wide as the keys.

        Returns:
            ``[n, num_heads, qk_dim]`` and ``[n, num_heads, value_dim]``, or as wide as the keys.
        """
        shape = self.shape
        made = F.linear(latent[:, : shape.rank], self.up.flatten(0, 1))
        made = made.unflatten(1, (shape.num_heads, -1))
        k = made.new_empty(*made.shape[:2], shape.qk_dim)
        k[..., : shape.nope_dim] = made[..., : shape.nope_dim]
        k[..., shape.nope_dim :] = latent[:, None, shape.rank :]
        v = made[..., shape.nope_dim :]
        return k, F.pad(v, (0, shape.qk_dim - shape.value_dim)) if pad else v

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """Queries whose products with latent rows are those of ``q`` with the rows' keys.

        ``[n, num_heads, qk_dim]`` to ``[n, num_heads, row_dim]``.
        """
        nope = self.shape.nope_dim
        taken = torch.bmm(q[..., :nope].transpose(0, 1), self.up[:, :nope])
        return torch.cat([taken.transpose(0, 1), q[..., nope:]], dim=-1)

    def values_of(self, mixed: torch.Tensor) -> torch.Tensor:
        """``[n, num_heads, rank]``, weighted latents, to values ``[n, num_heads, value_dim]``."""
        values = torch.bmm(mixed.transpose(0, 1), self.up[:, self.shape.nope_dim :].mT)
        return values.transpose(0, 1)
