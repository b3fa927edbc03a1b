"""Rotary position embedding: cosines and sines are gathered once a forward, applied in each layer.

The table is a float32 buffer over every position of the context, so a segment reads positions
from their static buffer and nothing else; its values are cast to the activations' dtype after
the gather, as transformers does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from breakgraph.kernels.gather import gather_rows
from breakgraph.kernels.rotary import qk_norm_rope_store, qkv_norm_rope_store
from breakgraph.layers.norm import RMSNorm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SCALED_ROPE_TYPES = ("linear", "llama3", "yarn")
"""Rope types whose frequencies do not depend on the length of the sequence."""


class CachedHeads(Protocol):
    """An attention layer's cache."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor


class RotaryEmbedding(nn.Module):
    """The cos and sin of every position, ``[max_position_embeddings, 2, rotary_dim / 2]``.

    Of each head the first ``rotary_dim`` elements are rotated, ``partial_rotary_factor`` of them.

    Raises:
        ValueError: the config asks for a rope type that is not supported.
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
        """Gather int64 ``positions: [rows]``; returns ``[rows, 2, rotary_dim / 2]``."""
        return gather_rows(self.table, positions, dtype=dtype)


def rotate_and_store(
    cache: CachedHeads,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    out_cache_loc: torch.Tensor,
    q_norm: RMSNorm | None = None,
    k_norm: RMSNorm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the heads where there are norms, rotate them, and store k and v in ``cache``.

    Args:
        cache: whose ``k_cache`` and ``v_cache`` take the rows.
        q: ``[rows, num_heads, head_dim]``, any strides with a dense last dimension.
        k: ``[rows, num_kv_heads, head_dim]``, likewise.
        v: as ``k``.
        cos_sin: ``[rows, 2, rotary_dim / 2]``, from ``RotaryEmbedding``.
        out_cache_loc: int64 ``[rows]``, the slot of each row.
        q_norm: over each query head.
        k_norm: over each key head.

    Returns:
        q and k for attention, contiguous.
    """
    return qk_norm_rope_store(
        q,
        k,
        v,
        cos_sin=cos_sin,
        out_cache_loc=out_cache_loc,
        k_cache=cache.k_cache,
        v_cache=cache.v_cache,
        **_norms(q_norm, k_norm),
    )


def split_rotate_and_store(
    cache: CachedHeads,
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    out_cache_loc: torch.Tensor,
    q_norm: RMSNorm | None = None,
    k_norm: RMSNorm | None = None,
    normed: torch.Tensor | None = None,
    normed_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rotate_and_store`` of ``qkv: [rows, (num_heads + 2 * num_kv_heads) * head_dim]``.

    With ``normed_eps`` it is the product of ``normed``, ``[rows, hidden]``, and lacks the
    ``row_factor`` of that, see ``RMSNorm.deferred``.

    Returns:
        q and k for attention, contiguous, and v, a view of ``qkv``.
    """
    return qkv_norm_rope_store(
        qkv,
        cos_sin=cos_sin,
        out_cache_loc=out_cache_loc,
        k_cache=cache.k_cache,
        v_cache=cache.v_cache,
        normed=None if normed_eps is None else normed,
        normed_eps=normed_eps or 0.0,
        **_norms(q_norm, k_norm),
    )


def _norms(q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> dict[str, Any]:
    if q_norm is None or k_norm is None:
        return {}
    weights = {"q_weight": q_norm.weight, "k_weight": k_norm.weight}
    return weights | {"eps": q_norm.eps, "offset": q_norm.offset}


def _frequencies(config: PreTrainedConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """The inverse frequencies ``[rotary_dim / 2]`` and the factor on cos and sin."""
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        inv_freq, scaling = 1.0 / (rope["rope_theta"] ** exponents), 1.0
    elif rope_type in SCALED_ROPE_TYPES:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    else:
        raise ValueError(
            f"rope type {rope_type!r} is not supported; "
            f"supported are default, {', '.join(SCALED_ROPE_TYPES)}"
        )
    return inv_freq, scaling
