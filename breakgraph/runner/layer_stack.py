"""The inner layer stack is asked for, not guessed."""

from __future__ import annotations

from torch import nn

WRAPPERS = ("language_model", "model")


def resolve_layer_stack(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The module that ``get_layer_stack()`` of the model, or of what it wraps, gives.

    Returns:
        The stack and "", or None and a sentence that says which attribute was missing.
    """
    inner: nn.Module | None = model
    tried = []
    while inner is not None:
        ask = getattr(inner, "get_layer_stack", None)
        if ask is not None:
            return ask(), ""
        tried.append(type(inner).__name__)
        inner = next(
            (wrapped for name in WRAPPERS if (wrapped := getattr(inner, name, None)) is not None),
            None,
        )
    return None, (
        f"{' > '.join(tried)} has no get_layer_stack() (nor has a model under "
        f"{' or '.join(WRAPPERS)}), so its prefill runs eagerly"
    )
