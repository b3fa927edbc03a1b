"""Which class runs an architecture named in ``config.json``."""

from __future__ import annotations

from collections.abc import Sequence

from breakgraph.models import deepseek, dense, nemotron_h, qwen3_next
from breakgraph.models.base import PrefillModel

_CLASSES: tuple[type[PrefillModel], ...] = (
    dense.LlamaForCausalLM,
    dense.LlamaForSequenceClassification,
    dense.LlamaModel,
    dense.Qwen2ForCausalLM,
    dense.Qwen2ForSequenceClassification,
    dense.Qwen2Model,
    dense.Qwen3ForCausalLM,
    dense.Qwen3ForSequenceClassification,
    dense.Qwen3Model,
    dense.Qwen3MoeForCausalLM,
    dense.Qwen3MoeModel,
    deepseek.DeepseekV2ForCausalLM,
    deepseek.DeepseekV2Model,
    deepseek.DeepseekV3ForCausalLM,
    deepseek.DeepseekV3Model,
    nemotron_h.NemotronHForCausalLM,
    nemotron_h.NemotronHModel,
    qwen3_next.Qwen3NextForCausalLM,
    qwen3_next.Qwen3NextModel,
)

MODELS: dict[str, type[PrefillModel]] = {cls.__name__: cls for cls in _CLASSES}
"""Model classes by architecture name."""


def find_model_class(architectures: Sequence[str]) -> type[PrefillModel]:
    """The class of the first known architecture. Raises ValueError, listing the known ones."""
    for name in architectures:
        if name in MODELS:
            return MODELS[name]
    asked = ", ".join(map(str, architectures)) or "none"
    raise ValueError(f"unknown architecture ({asked}); the known ones are {', '.join(MODELS)}")
