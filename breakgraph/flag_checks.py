"""What flags may say, each alone and beside the others.

What would be ignored in silence is an error, or, where it depends on the machine, a warning. Errors
name the flag and what to do instead.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from breakgraph.flag_parser import flag_name

if TYPE_CHECKING:
    from breakgraph.server_args import ServerArgs

logger = logging.getLogger(__name__)

DEFAULT_SLOTS = 8


def check_values(args: ServerArgs) -> None:
    """Raise ValueError on a value that its flag cannot have."""
    if not args.model_path:
        raise ValueError("--model-path is empty; name a folder with config.json")
    if not args.max_prefill_padding >= 1:
        raise ValueError(
            "--max-prefill-padding must be at least 1, which allows no padding, "
            f"not {args.max_prefill_padding}"
        )
    if not 0 < args.mem_fraction_static < 1:
        raise ValueError(
            "--mem-fraction-static is a share between 0 and 1, such as 0.8, "
            f"not {args.mem_fraction_static}"
        )
    if not 0 <= args.verify_prefill_graph <= 1:
        raise ValueError(
            "--verify-prefill-graph is a share between 0, none, and 1, every replayed prefill, "
            f"not {args.verify_prefill_graph}"
        )
    for name in ("request_seconds", "drain_seconds"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{flag_name(name)} must be more than 0 seconds")
    if args.port > 65535:
        raise ValueError(f"--port is at most 65535, not {args.port}")
    if args.api_key is not None and not args.api_key.strip():
        raise ValueError("--api-key is empty; leave the flag out to serve without a key")


def check_together(args: ServerArgs) -> None:
    """Raise ValueError on flags that contradict each other, or would be ignored in silence."""
    attention = f"--attention-backend {args.attention_backend}"
    on_gpu = args.attention_backend in ("torch_flash", "flashinfer")
    if args.device == "cpu" and on_gpu:
        raise ValueError(f"{attention} needs a GPU; with --device cpu use torch_native")
    if args.dtype == "float32" and on_gpu:
        raise ValueError(
            f"{attention} computes in half precision; use --dtype bfloat16, or torch_native "
            "for float32"
        )
    if args.tp_size > 1 and args.verify_prefill_graph:
        raise ValueError(
            "--verify-prefill-graph runs forwards on one rank alone, which --tp-size "
            f"{args.tp_size} does not allow; leave one out"
        )
    if args.tp_size % args.dp_size:
        raise ValueError(
            f"--dp-size {args.dp_size} must divide --tp-size, which is {args.tp_size}: it is into "
            "how many groups those ranks are divided. For whole copies of a model start a server "
            "each"
        )
    if args.dp_size > 1 and args.moe_scatter:
        raise ValueError(
            "--moe-scatter divides rows that all ranks have, and with --dp-size each rank has "
            "its own; leave one out"
        )
    if args.dp_size > 1 and args.linear_attention_capture:
        raise ValueError(
            "--linear-attention-capture chooses graphs by the requests of a batch, and with "
            "--dp-size each rank has a batch of its own; leave one out"
        )
    if args.pooling != "auto" and not args.is_embedding:
        raise ValueError(f"--pooling {args.pooling} does nothing without --is-embedding; add it")
    _check_graphs(args)
    states, running = args.max_mamba_cache_size, args.max_running_requests
    if states is not None and states < running:
        raise ValueError(
            f"--max-mamba-cache-size {states} is less than --max-running-requests {running}, "
            "each of which has a state; raise the first or lower the second"
        )
    chunk, total = args.chunked_prefill_size, args.max_total_tokens
    if chunk is not None and total is not None and chunk > total:
        raise ValueError(
            f"--chunked-prefill-size {chunk} is more than the --max-total-tokens {total} that "
            "the cache holds; lower the first or raise the second"
        )


def _check_graphs(args: ServerArgs) -> None:
    prefill, decode = args.cuda_graph_backend_prefill, args.cuda_graph_backend_decode
    if args.enable_breakable_cuda_graph and prefill in ("disabled", "full"):
        raise ValueError(
            f"--enable-breakable-cuda-graph and --cuda-graph-backend-prefill {prefill} "
            "contradict each other; leave one out"
        )
    if args.dp_size > 1 and prefill in ("full", "auto"):
        raise ValueError(
            f"--cuda-graph-backend-prefill {prefill} decides by each batch's requests, and "
            "with --dp-size ranks have batches of their own; use breakable"
        )
    if args.cuda_graph_memory_budget is not None and not args.cuda_graph_memory_budget > 0:
        raise ValueError(
            "--cuda-graph-memory-budget must be more than 0 gigabytes; with "
            "--cuda-graph-backend-prefill disabled there are no prefill graphs"
        )
    if args.disable_cuda_graph and decode not in (None, "disabled"):
        raise ValueError(
            f"--disable-cuda-graph and --cuda-graph-backend-decode {decode} contradict each "
            "other; leave one out"
        )
    if args.cuda_graph_bs is not None and args.disable_cuda_graph:
        raise ValueError("--cuda-graph-bs and --disable-cuda-graph contradict each other")


def warn_of_idle_flags(
    args: ServerArgs, prefill: str, decode: str, *, own_ladder: bool, own_sizes: bool
) -> None:
    """Say which flags do nothing beside the others.

    Args:
        args: the flags as given.
        prefill, decode: what captures each, as resolved.
        own_ladder, own_sizes: whether token buckets and decode sizes were given.
    """
    eager, linear = prefill == "disabled", args.linear_attention_capture
    no_graphs = "without --enable-breakable-cuda-graph or --cuda-graph-backend-prefill"
    slots = args.prefill_graph_requests != DEFAULT_SLOTS and prefill not in ("full", "auto")
    idle = (
        ("piecewise-cuda-graph-tokens", eager and own_ladder, no_graphs),
        ("linear-attention-capture", eager and linear, no_graphs),
        (
            "linear-attention-capture",
            prefill == "full" and linear,
            "with --cuda-graph-backend-prefill full, whose graphs hold such layers anyway",
        ),
        ("cuda-graph-memory-budget", eager and args.cuda_graph_memory_budget, no_graphs),
        ("verify-prefill-graph", eager and args.verify_prefill_graph, no_graphs),
        (
            "prefill-graph-requests",
            slots,
            "without --cuda-graph-backend-prefill full or auto",
        ),
        ("cuda-graph-bs", decode == "disabled" and own_sizes, "with decode graphs disabled"),
        (
            "debug-cuda-graph",
            args.debug_cuda_graph and eager and decode == "disabled",
            "without graphs to debug",
        ),
        ("moe-scatter", args.moe_scatter and args.tp_size == 1, "without --tp-size 2 or more"),
        (
            "max-mamba-cache-size",
            args.max_mamba_cache_size is not None and args.disable_radix_cache,
            "with --disable-radix-cache: only running requests have states",
        ),
    )
    for flag, does_nothing, why in idle:
        if does_nothing:
            logger.warning("--%s does nothing %s", flag, why)
