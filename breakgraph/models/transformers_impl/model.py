"""A transformers model as a runner wants it: embedding, layer stack and head.

The three are found by the library's own accessors. The head is the class's own forward with the
decoder's result put in its place, so whatever a class does to its logits (a scale, a cap, a bias)
is done; where that comes to one matrix product, the product is what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from breakgraph.forward import LayerInputs
from breakgraph.models.base import (
    CausalLM,
    Head,
    LayerStack,
    PrefillModel,
)
from breakgraph.models.transformers_impl.attention import WrappedAttention
from breakgraph.models.transformers_impl.interface import LayerCalls, Switches


@dataclass(frozen=True, slots=True)
class Parts:
    """A model taken apart.

    Attributes:
        model: the whole.
        decoder: its layer stack.
        embedding: its token embedding.
        arguments: constants that the decoder is called with.
        output_type: what the decoder gives, a class of transformers' outputs.
        modules: whose attention calls ``layers`` serve, in the order of a forward.
        layers: the attention layers.
        switches: what is ours during a forward.
        hidden_size: of embeddings and hidden states.
        context_length: the longest sequence, in tokens.
    """

    model: Any
    decoder: Any
    embedding: Any
    arguments: dict[str, Any]
    output_type: type
    modules: list[nn.Module]
    layers: list[WrappedAttention]
    switches: Switches
    hidden_size: int
    context_length: int

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one, so that keys and values can be cached."""
        return all(layer.reach.right == 0 for layer in self.layers)


class TransformersStack(LayerStack):
    """The class's decoder over packed rows: one sequence to it, told apart by positions.

    Attributes:
        position_offset: added to positions, for classes that count from their padding token on.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.decoder = parts.decoder
        self.position_offset = 0
        self.attention = nn.ModuleList(parts.layers)
        self._parts = parts

    def forward(self, inputs: LayerInputs) -> torch.Tensor:
        parts = self._parts
        positions = inputs.positions.unsqueeze(0)
        if self.position_offset:
            positions = positions + self.position_offset
        calls = LayerCalls(parts.modules, parts.layers, inputs.out_cache_loc)
        with parts.switches.ours(calls):
            output = self.decoder(
                # A copy: some classes scale what they are given in place.
                inputs_embeds=inputs.hidden_states.unsqueeze(0).clone(),
                position_ids=positions,
                **parts.arguments,
            )
        calls.check_complete()
        hidden: torch.Tensor = output[0]
        return hidden.squeeze(0)


class TransformersModel(PrefillModel):
    """A model without a head, and the base of those below."""

    model: TransformersStack

    def __init__(self, parts: Parts) -> None:
        nn.Module.__init__(self)
        self.inner = parts.model
        self.config = parts.model.config.get_text_config(decoder=True)
        self.model = TransformersStack(parts)
        self._parts = parts

    @property
    def parts(self) -> Parts:
        """The class, taken apart."""
        return self._parts

    @property
    def hidden_size(self) -> int:
        return self._parts.hidden_size

    @property
    def context_length(self) -> int:
        return self._parts.context_length - self.model.position_offset

    @property
    def vocab_size(self) -> int:
        weight: torch.Tensor = self._parts.embedding.weight
        return weight.shape[0]

    @property
    def causal(self) -> bool:
        return self._parts.causal

    @property
    def architecture(self) -> str:
        return type(self.inner).__name__

    @property
    def end_token_ids(self) -> set[int]:
        """The tokens that end a text, by the model's generation config; empty if it has none."""
        ids = getattr(getattr(self.inner, "generation_config", None), "eos_token_id", None)
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)

    @property
    def decode_limits(self) -> str:
        limits = [limit for layer in self._parts.layers for limit in layer.limits]
        return ", ".join(dict.fromkeys(limits))

    def try_otherwise(self) -> bool:
        """Compute the experts in the next of the ways that hold no loop over data."""
        switches = self._parts.switches
        if not switches.other_experts:
            return False
        switches.experts = switches.other_experts.pop(0)
        return True

    def embed(self, input_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        embedded: torch.Tensor = self._parts.embedding(input_ids.unsqueeze(0)).squeeze(0)
        return embedded if out is None else out.copy_(embedded)

    def rest_of_class(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The logits that the class makes of a sequence's hidden states.

        Args:
            hidden: ``[tokens, hidden_size]``.
            ids: int64 ``[tokens]``, for classes that look for padding.
        """
        return self._class_logits(hidden.unsqueeze(0), ids.unsqueeze(0))

    def _class_logits(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As that, of ``hidden: [sequences, tokens, hidden_size]``."""
        with _given(self._parts, hidden):
            logits: torch.Tensor = self.inner(input_ids=ids).logits
        return logits


class TransformersCausalLM(TransformersModel, CausalLM):
    """A model with a language-model head."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._plain = False

    @property
    def lm_head_weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.inner.get_output_embeddings().weight
        return weight

    @property
    def logits_head(self) -> torch.Tensor | Head:
        return self.lm_head_weight if self._plain else self.compute_logits

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, vocab_size]`` of ``hidden: [rows, hidden_size]``, by the class."""
        ids = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return self.rest_of_class(hidden, ids).squeeze(0)

    def choose_head(self, hidden: torch.Tensor) -> None:
        """Take the plain product for the head if it gives what the class gives.

        Also of rows so large that logits reach 1000: a cap on logits shows in those alone.
        """
        head = self.inner.get_output_embeddings()
        weight = getattr(head, "weight", None)
        own = self.compute_logits(hidden)
        shape = (own.shape[-1], hidden.shape[-1])
        if weight is None or weight.shape != shape or getattr(head, "bias", None) is not None:
            return
        scale = 1000 / own.float().abs().max().clamp(min=1e-20)
        large = (hidden.float() * scale).to(hidden.dtype)
        limit = 1e-2 if hidden.dtype.itemsize == 2 else 1e-4
        self._plain = all(
            bool((F.linear(rows, weight) - logits).norm() <= limit * logits.norm())
            for rows, logits in ((hidden, own), (large, self.compute_logits(large)))
        )


@contextmanager
def _given(parts: Parts, hidden: torch.Tensor) -> Iterator[None]:
    """While this lasts, the decoder gives ``hidden`` whatever it is called with."""
    decoder = parts.decoder
    given = parts.output_type(last_hidden_state=hidden)
    if "pooler_output" in getattr(parts.output_type, "__dataclass_fields__", ()):
        pooler = getattr(decoder, "pooler", None)
        given["pooler_output"] = None if pooler is None else pooler(hidden)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return given

    before = decoder.__dict__.get("forward")
    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before
