"""An engine around a transformers model that is loaded already, by one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from breakgraph.engine.engine import Engine
from breakgraph.models.transformers_impl import wrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **flags: Any
) -> Engine:
    """An engine over ``model``'s own weights, prefill captured in breakable graphs.

    The model stays its owner's: called directly it computes as before, in evaluation mode, but not
    from another thread while the engine runs. Its weights must stay where they are for as long as
    the engine lives.

    Args:
        model: on the CPU or one GPU: a causal language model, a multimodal model around one, a
            classifier of sequences, or a bare decoder (with ``is_embedding=True``).
        tokenizer: for prompts that are texts; without one they are token ids.
        **flags: attributes of ``ServerArgs``, such as ``chunked_prefill_size``.

    Raises:
        ModelLoadError: the class does what cannot be run from a KV cache; says what and where.
        ValueError: a flag is wrong.
        TypeError: a keyword is no flag.
    """
    device = model.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"the model is on {device} and the current device is {torch.cuda.current_device()}; "
            f"call torch.cuda.set_device({device.index}) first"
        )
    wrapped = wrap_model(model)
    own: dict[str, Any] = {
        "model_path": getattr(model, "name_or_path", "") or type(model).__name__,
        "device": device.type,
        "skip_tokenizer_init": tokenizer is None,
        "enable_breakable_cuda_graph": True,
    }
    return Engine(model=wrapped, tokenizer=tokenizer, **own | flags)
