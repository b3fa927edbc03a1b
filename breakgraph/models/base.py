"""What a runner asks of a model: an embedding, a layer stack, and one kind of head.

The stack reads ``LayerInputs``, its own weights and buffers, and nothing else; it never writes
to its inputs. Embedding and head stay outside of it, so they are never captured. Weight names
are the checkpoint's: the stack is ``model``, with ``embed_tokens`` in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from breakgraph.forward import LayerInputs
from breakgraph.layers import Embedding, Linear, VocabularyLinear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


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

    checkpoint_renames: tuple[tuple[str, str], ...] = ()

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = self.build_stack(config)

    @property
    def architecture(self) -> str:
        """The class, as ``config.json`` names it."""
        return type(self).__name__

    @property
    def hidden_size(self) -> int:
        """Of embedded tokens and of hidden states."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return int(self.config.vocab_size)

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return True

    @property
    def decode_limits(self) -> str:
        """What of its attention no segment of a decode graph can hold, so that it breaks there
        too; empty for nothing."""
        return ""

    def try_otherwise(self) -> bool:
        """After a capture that failed: compute some other way, if there is one left to try."""
        return False

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
        self.lm_head = None if tied else VocabularyLinear(config.hidden_size, config.vocab_size)

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """``[vocab_size, hidden_size]``, or this rank's share of the rows."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    @property
    def logits_head(self) -> torch.Tensor | Head:
        """What makes logits of hidden states ``[rows, hidden_size]``: a weight or a function."""
        return self.lm_head_weight


class SequenceClassifier(PrefillModel):
    """A model with a classification head, ``score.weight: [num_labels, hidden_size]``."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.score = Linear(config.hidden_size, config.num_labels or 2)
