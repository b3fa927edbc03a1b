"""What outlives a forward: the KV pool, its slots, and which request holds which of them."""

from breakgraph.memory.kv_pool import KVPool
from breakgraph.memory.request_table import RequestTable
from breakgraph.memory.slot_allocator import OutOfSlotsError, SlotAllocator

__all__ = ["KVPool", "OutOfSlotsError", "RequestTable", "SlotAllocator"]
