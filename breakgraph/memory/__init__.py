"""What outlives a forward: the KV pool, its slots, who holds them, and cached prefixes."""

from breakgraph.memory.kv_pool import KVPool
from breakgraph.memory.kv_space import KVSpace
from breakgraph.memory.radix_cache import RadixCache
from breakgraph.memory.request_table import RequestTable
from breakgraph.memory.slot_allocator import OutOfSlotsError, SlotAllocator

__all__ = [
    "KVPool",
    "KVSpace",
    "OutOfSlotsError",
    "RadixCache",
    "RequestTable",
    "SlotAllocator",
]
