"""The live batch, which every layer may read and no layer may change."""

from breakgraph.forward.forward_batch import (
    DecodeInputs,
    ForwardBatch,
    ForwardMode,
    LayerInputs,
    pack,
)
from breakgraph.forward.forward_context import (
    ForwardContext,
    forward_context,
    get_forward_context,
)
from breakgraph.forward.rank_counts import RankCounts
from breakgraph.forward.staging import HostStaging, current_stream

__all__ = [
    "DecodeInputs",
    "ForwardBatch",
    "ForwardContext",
    "ForwardMode",
    "HostStaging",
    "LayerInputs",
    "RankCounts",
    "current_stream",
    "forward_context",
    "get_forward_context",
    "pack",
]
