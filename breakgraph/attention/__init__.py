"""Sequence mixers: the layers that break a graph, and the backends that do their work."""

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.flashinfer import FlashInferBackend
from breakgraph.attention.hybrid import HybridAttentionBackend
from breakgraph.attention.latent_backends import (
    FlashLatentPrefillBackend,
    LatentDecodeBackend,
    LatentPrefillBackend,
)
from breakgraph.attention.latent_plan import LatentShape
from breakgraph.attention.layer import Attention, beyond_causal, see_everything
from breakgraph.attention.linear_attention import (
    ExtendPlan,
    LinearAttentionBackend,
    LinearDecodeBackend,
    LinearPrefillBackend,
    RadixLinearAttention,
    StepPlan,
)
from breakgraph.attention.mla import LatentAttention
from breakgraph.attention.paged_decode import PagedDecodeBackend, SlotMirror
from breakgraph.attention.tiled import ByRowsBackend, TiledBackend
from breakgraph.attention.torch_flash import TorchFlashBackend
from breakgraph.attention.torch_native import TorchNativeBackend

__all__ = [
    "Attention",
    "AttentionBackend",
    "ByRowsBackend",
    "ExtendPlan",
    "FlashInferBackend",
    "FlashLatentPrefillBackend",
    "HybridAttentionBackend",
    "LatentAttention",
    "LatentDecodeBackend",
    "LatentPrefillBackend",
    "LatentShape",
    "LinearAttentionBackend",
    "LinearDecodeBackend",
    "LinearPrefillBackend",
    "PagedDecodeBackend",
    "RadixLinearAttention",
    "SlotMirror",
    "StepPlan",
    "TiledBackend",
    "TorchFlashBackend",
    "TorchNativeBackend",
    "beyond_causal",
    "see_everything",
]
