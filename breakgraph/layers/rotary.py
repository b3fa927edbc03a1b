"""Rotary position embedding: cosines and sines are gathered once a forward, applied in each layer.

The table is a float32 buffer over every position of the context, so a segment reads positions
from their static buffer and nothing else; its values are cast to the activations' dtype after
the gather, as transformers does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SCALED_ROPE_TYPES = ("linear", "llama3", "yarn")
"""Rope types whose frequencies do not depend on the length of the sequence."""


class RotaryEmbedding(nn.Module):
    """The cos and sin of every position, ``[max_position_embeddings, 2, head_dim / 2]``.

    Raises:
        ValueError: the config asks for a rope type, or a rotated share of the head, that is
            not supported.
    """

    table: torch.Tensor

    def __init__(self, config: PreTrainedConfig, head_dim: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # real numbers, also while the weights are on the meta device
            inv_freq, scaling = _frequencies(config, head_dim)
            positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
            angles = torch.outer(positions, inv_freq)
            table = torch.stack([angles.cos(), angles.sin()], dim=1).mul_(scaling)
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Gather int64 ``positions: [rows]``; returns ``[rows, 2, head_dim / 2]``."""
        return self.table.index_select(0, positions).to(dtype)


def apply_rotary(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head against each other, in three kernels.

    Adding ``x.roll(head_dim / 2) * signed_sin`` is three as well, but copies: for 24 heads of
    128 on an H200, 8.4 µs against 7.6 at 16 tokens and 78 against 39 at 2048.

    Args:
        x: ``[rows, heads, head_dim]``, any strides with a dense last dimension; left as it is.
        cos_sin: ``[rows, 2, head_dim / 2]``, from ``RotaryEmbedding``.

    Returns:
        ``[rows, heads, head_dim]``, contiguous.
    """
    cos, sin = cos_sin[:, 0, None], cos_sin[:, 1, None]
    halves = x.unflatten(-1, (2, -1))
    rotated = halves * cos[:, None]
    rotated[:, :, 0].addcmul_(halves[:, :, 1], sin, value=-1)
    rotated[:, :, 1].addcmul_(halves[:, :, 0], sin)
    return rotated.flatten(2)


def _frequencies(config: PreTrainedConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """The inverse frequencies ``[head_dim / 2]`` and the factor on cos and sin."""
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq, scaling = 1.0 / (rope["rope_theta"] ** exponents), 1.0
    elif rope_type in SCALED_ROPE_TYPES:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    else:
        raise ValueError(
            f"rope type {rope_type!r} is not supported; "
            f"supported are default, {', '.join(SCALED_ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or len(inv_freq) * 2 != head_dim:
        raise ValueError(
            f"only rotation of whole heads is supported, but partial_rotary_factor is "
            f"{rope.get('partial_rotary_factor')} for heads of {head_dim}"
        )
    return inv_freq, scaling
