"""Sequence mixers: the layers that break a graph, and the backends that do their work."""

from breakgraph.attention.base import AttentionBackend
from breakgraph.attention.layer import Attention
from breakgraph.attention.paged_decode import PagedDecodeBackend, SlotMirror
from breakgraph.attention.torch_flash import TorchFlashBackend
from breakgraph.attention.torch_native import TorchNativeBackend

__all__ = [
    "Attention",
    "AttentionBackend",
    "PagedDecodeBackend",
    "SlotMirror",
    "TorchFlashBackend",
    "TorchNativeBackend",
]
