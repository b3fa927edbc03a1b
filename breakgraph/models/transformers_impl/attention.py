"""One attention call of a transformers class, over the KV pool.

The store into the pool is captured and the mixing is a break, as with every attention layer. What
no backend has (soft caps, sinks, chunks, and on most backends windows) is computed in the break by
plain torch from the live batch's host lengths: a request at a time, or all at once where each has
one new token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from breakgraph.attention import Attention
from breakgraph.forward import get_forward_context
from breakgraph.graph import eager_on_graph
from breakgraph.kernels.rotary import qk_norm_rope_store
from breakgraph.models.transformers_impl.plan import PlanCache
from breakgraph.models.transformers_impl.reach import Reach

QUERY_BLOCK = 512
"""Queries whose scores are in memory at one time: 0.5 GB with 32 heads over 8192 keys."""


class WrappedAttention(Attention):
    """Attention as one call of a class asks for it.

    Queries, keys and values narrower than the pool's heads are padded with zeros, which change
    neither a score nor a value.

    Args:
        num_heads, num_kv_heads: of the call.
        head_dim: of the pool, the widest of all calls' queries and values.
        value_dim: of the call's values, and so of what it gives.
        scale: of the scores.
        reach: which keys a query sees.
        soft_cap: scores pass through ``cap * tanh(score / cap)``; None for no cap.
        sinks: ``[num_heads]``, a score more for each head in the softmax's sum; None for none.
        plans: shared by the layers of a model.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        scale: float,
        reach: Reach,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
        plans: PlanCache,
    ) -> None:
        super().__init__(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=scale
        )
        self.value_dim = value_dim
        self.reach, self.left, self.right = reach, reach.left, reach.right
        self.soft_cap = soft_cap
        self.plans = plans
        self.sinks = (sinks,)  # in a tuple: a parameter of the class's module, not of this one

    @property
    def limits(self) -> tuple[str, ...]:
        """What this call asks for beyond causal attention, which decode graphs do not have."""
        said = [] if self.reach == Reach() else [str(self.reach)]
        said += ["soft cap"] if self.soft_cap is not None else []
        return (*said, "sinks") if self.sinks[0] is not None else tuple(said)

    @property
    def is_window(self) -> bool:
        """Whether ``left`` and ``right`` say all that this call asks for."""
        return self.soft_cap is None and self.sinks[0] is None and self.reach.chunk is None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out_cache_loc: torch.Tensor
    ) -> torch.Tensor:
        """As ``Attention``, of any width; returns ``[rows, num_heads, value_dim]``."""
        q, k, v = (self._widened(tensor.to(v.dtype)) for tensor in (q, k, v))
        return super().forward(q, k, v, out_cache_loc)[..., : self.value_dim]

    def rotate_and_attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out_cache_loc: torch.Tensor,
        **how: Any,
    ) -> torch.Tensor:
        """Normalise and rotate heads as wide as the pool's, store, attend.

        Args:
            q, k, v: ``[rows, heads, head_dim]``, any strides with a dense last dimension.
            out_cache_loc: int64 ``[rows]``, the slot of each row.
            **how: the angles and norms, as for ``qk_norm_rope_store``.

        Returns:
            ``[rows, num_heads, head_dim]``.
        """
        q, k = qk_norm_rope_store(
            *(q, k, v),
            out_cache_loc=out_cache_loc,
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            **how,
        )
        return self.attend(q, k, v, out=q)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        backend = get_forward_context().attn_backend
        if not self.limits or (backend.windows and self.is_window):
            return super().attend(q, k, v, out)
        out = torch.zeros_like(q) if out is None else out
        self.mix_limited(q, k, v, out)
        return out

    @eager_on_graph(in_place=True)
    def mix_limited(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """The break of a call with ``limits``."""
        plan = self.plans.plan(get_forward_context().batch, out.device)
        if plan.is_step:
            for steps in plan.steps(self.reach):
                keys, values = self.k_cache[steps.slots], self.v_cache[steps.slots]
                out[steps.rows] = self._mix_steps(q[steps.rows], keys, values, steps.visible)
            return
        for sequence in plan.sequences():
            rows, keys, values = sequence.rows, k[sequence.rows], v[sequence.rows]
            if sequence.slots is not None:
                keys = torch.cat([self.k_cache[sequence.slots], keys])
                values = torch.cat([self.v_cache[sequence.slots], values])
            self._one_request(q[rows], keys, values, sequence.prefix, out[rows])

    def _one_request(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int, out: torch.Tensor
    ) -> None:
        """``q: [new, heads, dim]`` from position ``prefix`` on, over all ``k`` and ``v``."""
        positions = torch.arange(len(k), device=q.device)
        for block in range(0, len(q), QUERY_BLOCK):
            rows = slice(block, min(block + QUERY_BLOCK, len(q)))
            first, end = prefix + rows.start, prefix + rows.stop
            begin, stop = self.reach.keys_of(first, end, len(k))
            visible = self.reach.visible(positions[first:end], positions[begin:stop])
            args = (q[rows], k[begin:stop], v[begin:stop], visible)
            plain = self.soft_cap is None and self.sinks[0] is None
            out[rows].copy_(self._sdpa(*args) if plain else self._scores(*args))

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return mixed.squeeze(0).transpose(0, 1)

    def _scores(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """Soft cap before the mask (Gemma 2), sinks in the sum alone (GPT-OSS); float32 sums."""
        grouped = q.unflatten(1, (self.num_kv_heads, -1))
        scores = torch.einsum("qhgd,khd->hgqk", grouped, k)
        weights = self._weights(scores, visible, self._sinks(-1, 1, 1)).to(v.dtype)
        return torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)

    def _mix_steps(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """``q: [requests, heads, dim]`` over ``k`` and ``v: [requests, keys, kv heads, dim]``."""
        grouped = q.unflatten(1, (self.num_kv_heads, -1))
        scores = torch.einsum("rhgd,rkhd->rhgk", grouped, k)
        weights = self._weights(scores, visible[:, None, None], self._sinks(-1, 1)).to(v.dtype)
        return torch.einsum("rhgk,rkhd->rhgd", weights, v).flatten(1, 2)

    def _weights(
        self, scores: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        scores = scores.float() * self.scale
        if self.soft_cap is not None:
            scores = (scores / self.soft_cap).tanh() * self.soft_cap
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is None:
            return scores.softmax(-1)
        column = sinks.expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]

    def _sinks(self, *shape: int) -> torch.Tensor | None:
        """float32, heads in groups and then ``shape``."""
        (sinks,) = self.sinks
        return None if sinks is None else sinks.float().view(self.num_kv_heads, *shape)

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        missing = self.head_dim - tensor.shape[-1]
        return F.pad(tensor, (0, missing)) if missing else tensor.contiguous()
