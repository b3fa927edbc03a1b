"""What outlives a forward: KV and state pools, their slots, who holds them, cached prefixes."""

from breakgraph.memory.kv_pool import KVPool
from breakgraph.memory.kv_space import KVSpace
from breakgraph.memory.mamba_pool import MambaPool
from breakgraph.memory.radix_cache import RadixCache
from breakgraph.memory.rank_memory import RankMemory, StateSlots
from breakgraph.memory.request_table import RequestTable
from breakgraph.memory.slot_allocator import OutOfSlotsError, SlotAllocator
from breakgraph.memory.state_cache import StateCache

__all__ = [
    "KVPool",
    "KVSpace",
    "MambaPool",
    "OutOfSlotsError",
    "RadixCache",
    "RankMemory",
    "RequestTable",
    "SlotAllocator",
    "StateCache",
    "StateSlots",
]
