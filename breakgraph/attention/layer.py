"""The attention layer: the cache store is captured, the mixing is the eager break.

A backend whose plan lies in device memory (decode) is captured as well.
"""

from __future__ import annotations

import torch
from torch import nn

from breakgraph.forward import get_forward_context
from breakgraph.graph import eager_on_graph


class Attention(nn.Module):
    """Grouped-query attention over the KV pool.

    ``k_cache`` and ``v_cache`` (``[num_slots, num_kv_heads, head_dim]``) are bound by the
    KV pool before the first forward.

    Attributes:
        left: most tokens before its own that a query sees; None for all.
        right: most tokens after its own; 0 is causal, None is all. Backends that do not set
            ``windows`` see to causal attention over everything alone.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    left: int | None = None
    right: int | None = 0

    def __init__(
        self, *, num_heads: int, num_kv_heads: int, head_dim: int, scale: float | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out_cache_loc: torch.Tensor
    ) -> torch.Tensor:
        """Store k and v, then ``attend``.

        Args:
            q: ``[rows, num_heads, head_dim]``.
            k: ``[rows, num_kv_heads, head_dim]``.
            v: ``[rows, num_kv_heads, head_dim]``.
            out_cache_loc: int64 ``[rows]``, the slot of each row; 0 for padding.
        """
        self.k_cache.index_copy_(0, out_cache_loc, k)
        self.v_cache.index_copy_(0, out_cache_loc, v)
        return self.attend(q, k, v)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend over k and v, stored already, and the cached tokens before them.

        Returns:
            ``[rows, num_heads, head_dim]``; padded rows are zero, or what a captured backend puts
            there.
        """
        backend = get_forward_context().attn_backend
        if backend.capturable:
            out = torch.empty_like(q)
            backend.forward(self, q, k, v, out)
        else:
            out = torch.zeros_like(q)
            self.mix(q, k, v, out)
        return out

    @eager_on_graph()
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """The break: the live batch's attention, written into ``out``."""
        context = get_forward_context()
        if context.batch.num_tokens:  # an idle rank has none, and no plan
            context.attn_backend.forward(self, q, k, v, out)
