"""How much memory keys, values and recurrent states get, planned before anything is captured.

States come first: a request needs its whole state or cannot run, while keys and values are taken
a page at a time from what is left. All ranks have as much as the one with the least room.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from breakgraph.attention import Attention, LatentAttention, RadixLinearAttention
from breakgraph.distributed import SINGLE, TensorParallelGroup
from breakgraph.memory import KVPool, MambaPool

if TYPE_CHECKING:
    from breakgraph.models import PrefillModel
    from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)

CPU_CACHE_BYTES = 1 << 30
"""What the KV cache, and the states of cached prefixes, take on a CPU at most, each, unless
--max-total-tokens and --max-mamba-cache-size say otherwise."""


def make_mamba_pool(
    model: PrefillModel,
    args: ServerArgs,
    dtype: torch.dtype,
    device: torch.device,
    group: TensorParallelGroup = SINGLE,
) -> MambaPool | None:
    """The states of the model's recurrent mixers, bound to them; None where it has none.

    A state for each running request and, unless told otherwise, as many for cached prefixes as
    half of the free memory holds, up to one for each running request again.

    Raises:
        RuntimeError: the device has not the memory.
    """
    layers = [module for module in model.modules() if isinstance(module, RadixLinearAttention)]
    if not layers:
        return None
    running = args.max_running_requests
    saved = running
    if args.max_mamba_cache_size is not None:
        saved = args.max_mamba_cache_size - running
    elif not args.disable_radix_cache:
        half = (CPU_CACHE_BYTES if device.type == "cpu" else _room(args, device)) // 2
        fitting = half // MambaPool.bytes_per_slot(layers, dtype) - running - 1
        saved = group.minimum(max(0, min(running, fitting)))
    if args.disable_radix_cache:
        saved = 0
    pool = MambaPool(layers, running, saved, dtype, device)
    pool.bind(layers)
    return pool


def make_kv_pool(
    model: PrefillModel,
    args: ServerArgs,
    dtype: torch.dtype,
    device: torch.device,
    context_length: int,
    group: TensorParallelGroup = SINGLE,
) -> KVPool:
    """Keys and values of the model's attention layers, bound to them.

    Raises:
        ValueError: the memory, or the flags, leave no room for a page.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    first, page = layers[0], args.page_size
    shape = (len(layers), first.num_kv_heads, first.head_dim)
    with_values = not isinstance(first, LatentAttention)
    per_token = KVPool.bytes_per_token(*shape, dtype, with_values=with_values)
    tokens = args.max_total_tokens
    if tokens is None:
        room = CPU_CACHE_BYTES if device.type == "cpu" else _room(args, device)
        useful = args.max_running_requests * (-(-context_length // page) * page)
        tokens = group.minimum(min(room // per_token - page, useful))
        if tokens < page:
            raise ValueError(
                f"--mem-fraction-static {args.mem_fraction_static} leaves no memory for "
                "the KV cache after the weights; raise it"
            )
    pool = KVPool(
        shape[0], tokens, shape[1], shape[2], dtype, device, page, with_values=with_values
    )
    pool.bind(layers)
    logger.info("KV cache of %d tokens, %d bytes each", pool.num_tokens, per_token)
    return pool


def _room(args: ServerArgs, device: torch.device) -> int:
    """Bytes that --mem-fraction-static still leaves on a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total * args.mem_fraction_static) - (total - free)
