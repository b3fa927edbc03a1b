"""Attention and recurrent mixers of one forward, each planned by its own backend."""

from __future__ import annotations

import torch

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.layer import Attention
from breakgraph.attention.linear_attention import LinearAttentionBackend
from breakgraph.forward import ForwardBatch, LayerInputs


class HybridAttentionBackend(AttentionBackend):
    """``full`` for the attention layers, ``linear`` for the recurrent ones."""

    linear: LinearAttentionBackend

    def __init__(self, full: AttentionBackend, linear: LinearAttentionBackend) -> None:
        self.full, self.linear = full, linear
        self.capturable = full.capturable
        self.serves_prefixes = full.serves_prefixes
        limits = (full.max_requests, linear.max_requests)
        self.max_requests = min((limit for limit in limits if limit is not None), default=None)

    @property
    def name(self) -> str:
        return self.full.name

    def tensors(self) -> list[torch.Tensor]:
        return [*self.full.tensors(), *self.linear.tensors()]

    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        self.full.init_forward_metadata(batch, rows)
        self.linear.init_forward_metadata(batch)

    def begin_layers(self, inputs: LayerInputs) -> None:
        self.full.begin_layers(inputs)
        self.linear.begin_layers(inputs)

    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self.full.forward(layer, q, k, v, out)
