"""The backends of latent attention.

A prefill attends causally to the new tokens, whose keys and values the segment before made, and
then merges in the cached prefixes part by part, each up-projected or absorbed as the plan of the
live batch says. Both ways are in the one break, so a graph captured with either replays the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.latent_plan import LatentShape, PrefixPart, plan_prefixes
from breakgraph.attention.layer import Attention
from breakgraph.attention.mla import LatentAttention
from breakgraph.attention.paged_decode import PagedDecodeBackend
from breakgraph.forward import ForwardBatch, HostStaging
from breakgraph.kernels.latent_decode import latent_decode_attention
from breakgraph.kernels.partial_attention import attention_with_lse, merge_attention_

CHUNK_BYTES = 256 << 20
"""What a part takes at most: the keys and values of 1638 tokens of DeepSeek-V3 in bfloat16, or of
13107 of DeepSeek-V2-Lite; absorbed, the latent rows of 233016."""


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Queries and keys of one launch, sequence after sequence, by their ends from 0 on."""

    query_ends: list[int]
    key_ends: list[int]
    cu_seqlens: torch.Tensor
    """int32 ``[2, sequences + 1]``, the same on the device."""
    max_q: int
    max_k: int


@dataclass(frozen=True, slots=True)
class _Plan:
    num_tokens: int
    new: _Sequences
    parts: list[tuple[PrefixPart, _Sequences]]
    prefix_slots: torch.Tensor


class LatentPrefillBackend(AttentionBackend):
    """In plain torch ops, one request at a time: any device, any dtype.

    Attributes:
        chunk_tokens: the most cached tokens that are up-projected at a time.
        absorbed_tokens: the most that are gathered to be served absorbed.
    """

    def __init__(
        self,
        shape: LatentShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_requests: int,
        max_context_tokens: int,
    ) -> None:
        self.shape = shape
        # The product, the keys made of it, and values that may be as wide as the keys.
        elements = shape.num_heads * (shape.nope_dim + shape.value_dim + 2 * shape.qk_dim)
        self.chunk_tokens = max(64, CHUNK_BYTES // (elements * dtype.itemsize))
        self.absorbed_tokens = max(64, CHUNK_BYTES // (shape.row_dim * dtype.itemsize))
        self._staging = HostStaging(4 * (max_requests + 1) + max_context_tokens, device)
        self._plan: _Plan | None = None

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        parts = plan_prefixes(batch, self.shape, self.chunk_tokens, self.absorbed_tokens)
        new_lens = batch.extend_lens.tolist()
        lens: list[tuple[Sequence[int], Sequence[int]]] = [(new_lens, new_lens)]
        lens += [(part.new_lens, part.key_lens) for part in parts]
        cached = len(batch.prefix_slots)
        count = cached + sum(len(new) + 1 for new, _ in lens)
        if count > self._staging.capacity:
            self._staging = HostStaging(2 * count, self._staging.device_buffer.device)
        host = self._staging.host()
        host[:cached] = batch.prefix_slots
        # Each int64 behind the slots holds a pair of int32: both cu_seqlens of a launch.
        at, spans = cached, []
        ends: list[tuple[list[int], list[int]]] = []
        for pair in lens:
            span = slice(at, at + len(pair[0]) + 1)
            cu = host[span].view(np.int32).reshape(2, -1)
            cu[:, 0] = 0
            np.cumsum(pair, axis=1, out=cu[:, 1:])
            spans.append(span)
            ends.append((cu[0].tolist(), cu[1].tolist()))
            at = span.stop
        device = self._staging.send(count)
        sequences = [
            _Sequences(*both, device[span].view(torch.int32).view(2, -1), max(new), max(keys))
            for both, span, (new, keys) in zip(ends, spans, lens, strict=True)
        ]
        self._plan = _Plan(
            num_tokens=batch.num_tokens,
            new=sequences[0],
            parts=list(zip(parts, sequences[1:], strict=True)),
            prefix_slots=device[:cached],
        )

    @property
    def parts(self) -> list[PrefixPart]:
        """How the cached prefixes of the planned batch are served."""
        return [] if self._plan is None else [part for part, _ in self._plan.parts]

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        plan = self._plan
        if plan is None or not isinstance(layer, LatentAttention):
            raise RuntimeError("latent attention was called without a plan, or for another layer")
        q, k, v, out = (tensor[: plan.num_tokens] for tensor in (q, k, v, out))
        mixed, lse = self.attend(q, k, v, layer.scale, plan.new, causal=True)
        mixed = mixed[..., : self.shape.value_dim]
        if plan.parts:
            mixed, lse = mixed.float(), lse.contiguous()
        for part, sequences in plan.parts:
            rows = slice(*part.rows)
            latent = layer.k_cache.index_select(0, plan.prefix_slots[slice(*part.keys)]).squeeze(1)
            if part.absorbed:
                more, more_lse = _absorbed(layer, q[rows], latent)
            else:
                keys, values = layer.expand(latent, pad=self.equal_head_dims)
                more, more_lse = self.attend(
                    q[rows], keys, values, layer.scale, sequences, causal=False
                )
            more = more[..., : self.shape.value_dim]
            merge_attention_(mixed[rows], lse[rows], more, more_lse)
        out.copy_(mixed)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sequences: _Sequences,
        *,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of each sequence: ``[queries, num_heads, value_dim]``, and its log-sum-exp,
        float32 ``[queries, num_heads]``; see ``attention_with_lse``."""
        found = [
            attention_with_lse(q[q0:q1], k[k0:k1], v[k0:k1], scale, causal=causal)
            for (q0, q1), (k0, k1) in zip(
                pairwise(sequences.query_ends), pairwise(sequences.key_ends), strict=True
            )
        ]
        outs, sums = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(sums)


class FlashLatentPrefillBackend(LatentPrefillBackend):
    """By the FlashAttention-2 that torch carries, all sequences of a part in one launch.

    It wants values as wide as keys, so they are padded with zeros; absorbed parts, whose heads of
    576 elements are more than its 256, stay plain torch ops.
    """

    equal_head_dims = True

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sequences: _Sequences,
        *,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if v.shape[2] < k.shape[2]:
            v = F.pad(v, (0, k.shape[2] - v.shape[2]))
        cu_q, cu_k = sequences.cu_seqlens.unbind()
        mixed, lse = torch.ops.aten._flash_attention_forward.default(
            *(q, k, v, cu_q, cu_k, sequences.max_q, sequences.max_k, 0.0, causal, False),
            scale=scale,
        )[:2]
        return mixed, lse.t()


class LatentDecodeBackend(PagedDecodeBackend):
    """One new token a request, absorbed, its cached rows found through the mirror."""

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        inputs = self._inputs
        if inputs is None:
            raise RuntimeError("attention was called before begin_layers gave it the inputs")
        latent_decode_attention(
            q,
            layer.k_cache,
            self.mirror.slots,
            inputs.request_rows,
            inputs.seq_lens,
            layer.scale,
            out,
        )


def _absorbed(
    layer: LatentAttention, q: torch.Tensor, latent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request's queries to latent rows, all visible to all of them.

    ``q: [n, num_heads, qk_dim]``, ``latent: [keys, row_dim]``; returns ``[n, num_heads,
    value_dim]`` and the log-sum-exp, float32 ``[n, num_heads]``.
    """
    heads, row = q.shape[1], latent.unsqueeze(1)
    # The heads share their keys: to one product they are so many more queries.
    queries = layer.absorb(q).flatten(0, 1).unsqueeze(1)
    mixed, lse = attention_with_lse(
        queries, row, row[..., : layer.shape.rank], layer.scale, causal=False
    )
    mixed = mixed.squeeze(1).unflatten(0, (-1, heads)).to(q.dtype)
    return layer.values_of(mixed), lse.squeeze(1).unflatten(0, (-1, heads))
