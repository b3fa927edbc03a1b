"""The attention layer: the cache store is captured, the mixing is the eager break.

A backend whose plan lies in device memory (decode) is captured as well.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        """Store k and v, then ``attend``; where tokens see later ones nobody will read a store.

        Args:
            q: ``[rows, num_heads, head_dim]``.
            k: ``[rows, num_kv_heads, head_dim]``.
            v: ``[rows, num_kv_heads, head_dim]``.
            out_cache_loc: int64 ``[rows]``, the slot of each row; 0 for padding.
        """
        if self.right == 0:
            self.k_cache.index_copy_(0, out_cache_loc, k)
            self.v_cache.index_copy_(0, out_cache_loc, v)
        return self.attend(q, k, v)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over k and v, stored already, and the cached tokens before them.

        Args:
            q: ``[rows, num_heads, head_dim]``.
            k: ``[rows, num_kv_heads, head_dim]``.
            v: as k.
            out: like q, for the result: finite, because padded rows may be left as they are. It
                may be q itself, which costs neither memory nor a launch. None makes one of zeros.

        Returns:
            ``out``.
        """
        if out is None:
            out = torch.zeros_like(q)
        backend = get_forward_context().attn_backend
        if backend.capturable:
            backend.forward(self, q, k, v, out)
        else:
            self.mix(q, k, v, out)
        return out

    @eager_on_graph(in_place=True)
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """The break: the live batch's attention, written into ``out``."""
        context = get_forward_context()
        if context.batch.num_tokens:  # an idle rank has none, and no plan
            context.attn_backend.forward(self, q, k, v, out)


def beyond_causal(layers: Sequence[Attention]) -> str | None:
    """Why one plan of causal attention cannot serve all ``layers``, as a sentence, or None."""
    if len(shapes := _head_shapes(layers)) > 1:
        return f"the model's attention layers differ in their heads: {sorted(shapes)}"
    limits = {limit for layer in layers for limit in getattr(layer, "limits", ())}
    if limits or any(layer.left is not None or layer.right != 0 for layer in layers):
        said = ", ".join(sorted(limits)) or "windows, or tokens that see later ones"
        return f"it serves causal attention alone, and the model has {said}"
    return None


def see_everything(layers: Sequence[Attention]) -> bool:
    """Whether each token of a sequence sees all others in all ``layers``, which are alike."""
    limited = any(not getattr(layer, "is_window", True) for layer in layers)
    ends = {(layer.left, layer.right) for layer in layers}
    return not limited and ends == {(None, None)} and len(_head_shapes(layers)) == 1


def _head_shapes(layers: Sequence[Attention]) -> set[tuple[int, int, int]]:
    return {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in layers}
