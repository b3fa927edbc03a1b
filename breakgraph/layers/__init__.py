"""What models are built of, and the eager tails that follow them."""

from breakgraph.layers.embedding import Embedding
from breakgraph.layers.linear import (
    CheckpointSlot,
    ColumnLinear,
    Linear,
    PackedLinear,
    RowLinear,
    VocabularyLinear,
)
from breakgraph.layers.logits_processor import LogitsOutput, LogitsProcessor
from breakgraph.layers.mlp import GatedMLP, PlainMLP
from breakgraph.layers.moe import DeepseekMoe, NemotronHMoe, QwenSparseMoe
from breakgraph.layers.norm import GatedRMSNorm, RMSNorm
from breakgraph.layers.pooler import ClassificationHead, Pooler, PoolingMode
from breakgraph.layers.rotary import (
    RotaryEmbedding,
    rotate_and_store,
    split_rotate_and_store,
)

__all__ = [
    "CheckpointSlot",
    "ClassificationHead",
    "ColumnLinear",
    "DeepseekMoe",
    "Embedding",
    "GatedMLP",
    "GatedRMSNorm",
    "Linear",
    "LogitsOutput",
    "LogitsProcessor",
    "NemotronHMoe",
    "PackedLinear",
    "PlainMLP",
    "Pooler",
    "PoolingMode",
    "QwenSparseMoe",
    "RMSNorm",
    "RotaryEmbedding",
    "RowLinear",
    "VocabularyLinear",
    "rotate_and_store",
    "split_rotate_and_store",
]
