"""One model over several ranks that run every forward together."""

from breakgraph.distributed.collectives import CollectiveError
from breakgraph.distributed.group import SINGLE, TensorParallelGroup, current_group, expert_group
from breakgraph.distributed.sharding import Shard, equal_shard, kv_shard, vocabulary_shard

__all__ = [
    "SINGLE",
    "CollectiveError",
    "Shard",
    "TensorParallelGroup",
    "current_group",
    "equal_shard",
    "expert_group",
    "kv_shard",
    "vocabulary_shard",
]
