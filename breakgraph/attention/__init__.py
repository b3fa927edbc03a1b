"""Sequence mixers: the layers that break a graph, and the backends that do their work."""

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.hybrid import HybridAttentionBackend
from breakgraph.attention.layer import Attention
from breakgraph.attention.linear_attention import (
    ExtendPlan,
    LinearAttentionBackend,
    LinearDecodeBackend,
    LinearPrefillBackend,
    RadixLinearAttention,
    StepPlan,
)
from breakgraph.attention.paged_decode import PagedDecodeBackend, SlotMirror
from breakgraph.attention.torch_flash import TorchFlashBackend
from breakgraph.attention.torch_native import TorchNativeBackend

__all__ = [
    "Attention",
    "AttentionBackend",
    "ExtendPlan",
    "HybridAttentionBackend",
    "LinearAttentionBackend",
    "LinearDecodeBackend",
    "LinearPrefillBackend",
    "PagedDecodeBackend",
    "RadixLinearAttention",
    "SlotMirror",
    "StepPlan",
    "TorchFlashBackend",
    "TorchNativeBackend",
]
