"""What a capture may read; the rest is refused.

Weights, the static input buffers, constants, and what the capture itself made. Anything
else read by a segment, or handed to a break, replays stale data in silence, so it raises
here with the op, the tensor's shape and the call site.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from breakgraph.graph.callsite import call_site
from breakgraph.graph.errors import ForeignReadError, RefusedOpError

SEQUENCE_MIXERS = (
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "aten::_cudnn_attention",
    "aten::_scaled_dot_product",
    "aten::scaled_dot_product_attention",
    "aten::_safe_softmax",
    "torch_attn::",
)
"""Ops that see per-request lengths; in a segment they would replay the capture's lengths.

``_safe_softmax`` is what shows of a ``scaled_dot_product_attention`` by plain products, which alone
calls it."""


class CaptureAudit:
    """What a capture may read from outside, by storage, so that views count too.

    Attributes:
        allowed: those storages by their identity.
    """

    def __init__(self, allowed: Iterable[torch.Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in allowed]
        self.allowed = {storage._cdata: storage for storage in storages}

    def check_read(self, reader: object, tensor: torch.Tensor) -> None:
        """Raise ForeignReadError unless ``reader``, an op say, may read ``tensor`` from outside."""
        if tensor.untyped_storage()._cdata in self.allowed:
            return
        if not tensor.dim() and tensor.device.type == "cpu" and str(reader).startswith("aten"):
            return  # a constant
        raise ForeignReadError(
            f"{reader} reads a {tensor.dtype} tensor of shape {list(tensor.shape)} on "
            f"{tensor.device} that is no weight, no static input buffer, no constant and not "
            f"made in this capture ({call_site()}). A replay would read whatever is there by "
            "then. Pass it through the static input buffers, register it as a module buffer, "
            "or read it inside an eager_on_graph break."
        )

    def check_op(self, name: str) -> None:
        """Raise RefusedOpError if op ``name`` mixes tokens of a sequence."""
        if _mixes(name):
            if name == "aten::_safe_softmax":
                name = "aten::scaled_dot_product_attention"
            raise RefusedOpError(
                f"{name} mixes the tokens of a sequence inside a segment ({call_site()}), so it "
                "would replay the capture's lengths for every batch. Call it in an "
                "eager_on_graph break."
            )


@cache
def _mixes(name: str) -> bool:
    return name.startswith(SEQUENCE_MIXERS)
