"""What an attention backend is: plan once a forward on the host, launch once a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch

from breakgraph.forward.forward_batch import ForwardBatch, LayerInputs

if TYPE_CHECKING:
    from breakgraph.attention.layer import Attention
    from breakgraph.attention.linear_attention import LinearAttentionBackend

Refusal = Literal["more_requests_than_graph_slots", "cached_prefix_in_full_graph"]
"""Why a captured backend cannot serve a batch; values of the runner's ``DispatchReason``."""


class AttentionBackend(ABC):
    """Causal attention of a packed batch over its own tokens and their cached prefixes.

    Attributes:
        capturable: the plan lies in device memory at fixed addresses, so that ``forward`` may be
            part of a segment; else it is a break.
        max_requests: the most requests of a forward that is captured; None for any number.
        serves_prefixes: whether a captured forward finds the tokens cached before its own.
        equal_head_dims: values of a latent attention are to be padded to the width of its keys.
        windows: follows a layer's ``left`` and ``right``.
        linear: plans the model's recurrent mixers; None where it has none.
    """

    capturable = False
    max_requests: int | None = None
    serves_prefixes = True
    windows = False
    equal_head_dims = False
    linear: LinearAttentionBackend | None = None

    @property
    def name(self) -> str:
        """What it is called in reports, with those it is made of."""
        return type(self).__name__

    def tensors(self) -> list[torch.Tensor]:
        """What segments may read of the plan."""
        return []

    def refuses(self, batch: ForwardBatch) -> Refusal | None:
        """Why no graph that holds this backend can serve ``batch``; None where one can."""
        if self.max_requests is not None and batch.batch_size > self.max_requests:
            return "more_requests_than_graph_slots"
        if batch.has_prefix and not self.serves_prefixes:
            return "cached_prefix_in_full_graph"
        return None

    @abstractmethod
    def init_forward_metadata(self, batch: ForwardBatch, rows: int | None = None) -> None:
        """Plan ``batch`` from its host lengths, with no device-to-host sync.

        Args:
            batch: at least one token.
            rows: of the forward, its padding with them; None for as many as tokens. What is
                captured may differ by it, never by anything else of the batch.
        """

    def begin_layers(self, inputs: LayerInputs) -> None:  # noqa: B027
        """Run once before the first layer, captured with the layers; most need nothing."""

    @abstractmethod
    def forward(
        self,
        layer: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the planned batch's attention into the first ``num_tokens`` rows of ``out``.

        Args:
            layer: heads, scale and the layer's KV cache, where k and v are stored already.
            q: ``[rows, num_heads, head_dim]``, rows at or past ``num_tokens`` are padding.
            k: ``[rows, num_kv_heads, head_dim]``.
            v: ``[rows, num_kv_heads, head_dim]``.
            out: ``[rows, num_heads, head_dim]``, finite; it may be ``q`` itself. Padded rows are
                left as they are, or made finite numbers again.
        """
