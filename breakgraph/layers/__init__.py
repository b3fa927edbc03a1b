"""What models are built of, and the eager tails that follow them."""

from breakgraph.layers.embedding import Embedding
from breakgraph.layers.linear import CheckpointSlot, Linear, PackedLinear
from breakgraph.layers.logits_processor import LogitsOutput, LogitsProcessor
from breakgraph.layers.mlp import GatedMLP
from breakgraph.layers.norm import QKNorm, RMSNorm
from breakgraph.layers.pooler import ClassificationHead, Pooler, PoolingMode
from breakgraph.layers.rotary import RotaryEmbedding, apply_rotary

__all__ = [
    "CheckpointSlot",
    "ClassificationHead",
    "Embedding",
    "GatedMLP",
    "Linear",
    "LogitsOutput",
    "LogitsProcessor",
    "PackedLinear",
    "Pooler",
    "PoolingMode",
    "QKNorm",
    "RMSNorm",
    "RotaryEmbedding",
    "apply_rotary",
]
