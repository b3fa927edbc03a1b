"""RMS normalisation of hidden states and of query and key heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from breakgraph.layers.linear import CheckpointSlot, weight_parameter


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = weight_parameter(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class QKNorm(nn.Module):
    """RMS normalisation of each query and key head, straight from the fused projection.

    ``weight: [num_heads + num_kv_heads, head_dim]`` repeats the checkpoint's ``q_norm`` and
    ``k_norm`` vectors once a head, so that one multiplication serves both.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = weight_parameter(num_heads + num_kv_heads, head_dim)
        self.num_heads = num_heads
        self.eps = eps

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """Normalise the query and key heads.

        The value heads are normalised too and dropped: the projection is contiguous, its
        query and key heads alone would first be copied. For 16 and 8 heads of 128 on an H200
        that is 4.9 µs against 8.4 at 16 tokens, the same at 512, 56 against 49 at 2048.

        Args:
            qkv: ``[rows, num_heads + 2 * num_kv_heads, head_dim]``, left as it is.

        Returns:
            ``[rows, num_heads + num_kv_heads, head_dim]``.
        """
        heads, head_dim = self.weight.shape
        return F.rms_norm(qkv, (head_dim,), None, self.eps)[:, :heads].mul_(self.weight)

    def checkpoint_slots(self) -> dict[str, CheckpointSlot]:
        """The heads that each checkpoint vector is repeated over."""
        shape = (self.weight.shape[1],)
        weight = self.weight.detach()
        return {
            "q_norm.weight": CheckpointSlot(weight[: self.num_heads], shape),
            "k_norm.weight": CheckpointSlot(weight[self.num_heads :], shape),
        }
