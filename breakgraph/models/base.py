"""What a runner asks of a model: an embedding, a layer stack, and one kind of head.

The stack reads ``LayerInputs``, its own weights and buffers, and nothing else; it never writes
to its inputs. Embedding and head stay outside of it, so they are never captured. Weight names
are the checkpoint's: the stack is ``model``, with ``embed_tokens`` in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from breakgraph.forward import LayerInputs
from breakgraph.layers import Embedding, Linear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LayerStack(nn.Module):
    """All layers and the final norm."""

    embed_tokens: Embedding

    def forward(self, inputs: LayerInputs) -> torch.Tensor:
        """Run the layers over ``inputs``; returns ``[rows, hidden_size]``, normalised."""
        raise NotImplementedError


class PrefillModel(nn.Module):
    """A model without a head: an embedding checkpoint, or the base of the models below.

    Attributes:
        checkpoint_renames: patterns in the names of checkpoint tensors, and their replacements.
    """

    checkpoint_renames: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = self.build_stack(config)

    def build_stack(self, config: PreTrainedConfig) -> LayerStack:
        """The architecture. Raises ValueError, saying which field, if ``config`` asks for
        something unsupported."""
        raise NotImplementedError

    def get_layer_stack(self) -> LayerStack:
        """The part to capture."""
        return self.model

    def embed(self, input_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Embed int64 ``input_ids: [rows]``; gives ``[rows, hidden_size]``, ``out`` if given."""
        return self.model.embed_tokens(input_ids, out)


class CausalLM(PrefillModel):
    """A model with a language-model head, tied to the embedding or not."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size)

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """``[vocab_size, hidden_size]``."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight


class SequenceClassifier(PrefillModel):
    """A model with a classification head, ``score.weight: [num_labels, hidden_size]``."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.score = Linear(config.hidden_size, config.num_labels or 2)
