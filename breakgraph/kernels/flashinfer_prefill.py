"""FlashInfer's FlashAttention-3 prefill (Shah et al., 2024), launched over a schedule of our own.

The kernel is persistent: a block for each processor, which reads what to do from int32 arrays in
device memory (``tile_schedule``). Nothing about a batch is an argument of the launch, so a captured
launch serves every later batch whose schedule is written to the same place.

What it leans on in flashinfer-python 0.6.13, all below the wrappers and therefore pinned:

- ``flashinfer.jit.gen_batch_prefill_module("fa3", ...)`` and its module's ``paged_run`` and
  ``ragged_run``, called here with all their arguments by position, which keeps the host for 8 µs;
- the nine numbers that such a call takes as its plan: byte offsets of the arrays of the
  schedule, and whether heads share one. The module's own ``plan`` is not used: it writes them
  through one pinned buffer, which the next plan may overwrite before its copy is done, and for
  2048 works it takes 400 µs where ours takes 40;
- tiles of 192 query rows for heads of 64, else of 128, and one block for each multiprocessor.

It is a ``torch.library`` op, so that a capture sees, and audits, what it reads. On a CPU the op is
the reference, which goes through the schedule block by block.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from breakgraph.kernels.launch import processors

VERSION = "0.6.13"
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)

_library = torch.library.Library("breakgraph", "FRAGMENT")
_library.define(
    "flashinfer_prefill(Tensor q, Tensor k, Tensor v, Tensor schedule, int[] offsets, "
    "Tensor? key_slots, float scale, Tensor(a!) out) -> ()"
)


def flashinfer_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: torch.Tensor,
    offsets: Sequence[int],
    key_slots: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write into ``out`` the causal attention that ``schedule`` says; other rows stay as they are.

    Args:
        q: ``[rows, heads, head_dim]``, its last dimension dense.
        k: ``[slots, kv_heads, head_dim]``, or with no ``key_slots`` ``[rows, kv_heads, head_dim]``.
        v: as ``k``, with the same strides.
        schedule: int32, the arrays of a schedule.
        offsets: of ``plan_of``.
        key_slots: int32, the slot of each key; None where keys lie in rows like queries.
        scale: factor on the scores.
        out: as ``q``.
    """
    torch.ops.breakgraph.flashinfer_prefill(q, k, v, schedule, offsets, key_slots, scale, out)


def plan_of(ends_start: int, table_start: int, works: int) -> list[int]:
    """What a run takes as its plan: where the arrays of a schedule lie, in bytes.

    Args:
        ends_start: of the processors' ends, in int32 entries.
        table_start: of the table of works, likewise.
        works: that the table has room for.
    """
    tile, query, key, queries, keys, head = (4 * (table_start + row * works) for row in range(6))
    # Which request a work is of (the last but one) is read by no variant of ours: any array does.
    return [tile, query, key, queries, keys, head, 4 * ends_start, tile, 0]


def geometry(device: torch.device, head_dim: int) -> tuple[int, int]:
    """Processors, and query rows of a tile. On a CPU so few that small batches have many tiles."""
    if device.type == "cpu":
        return 3, 16
    return processors(device), 192 if head_dim == 64 else 128


def missing_for(device: torch.device) -> str | None:
    """What keeps the kernels from running here, as a sentence that says what to do, or None."""
    if device.type != "cuda":
        return "FlashInfer's kernels need a GPU"
    if torch.cuda.get_device_capability(device)[0] != 9:
        name = torch.cuda.get_device_name(device)
        return f"FlashAttention-3 needs a Hopper GPU (sm90), and this is {name}"
    try:
        found = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return "flashinfer is not installed: pip install 'breakgraph[flashinfer]'"
    if found != VERSION:
        return (
            f"flashinfer-python {found} is installed, and its internals are known as of {VERSION}: "
            "pip install 'breakgraph[flashinfer]'"
        )
    return None


@cache
def kernel_module(dtype: torch.dtype, head_dim: int) -> Any:
    """The compiled kernels. Raises RuntimeError, saying what to do, where there can be none."""
    try:
        from flashinfer.jit import gen_batch_prefill_module

        # Position encoding, window, soft cap and half-precision scores: none.
        types = (dtype, dtype, dtype, torch.int32, head_dim, head_dim)
        spec = gen_batch_prefill_module("fa3", *types, 0, False, False, False)
        if not spec.is_compiled:
            logger.info(
                "compiling FlashInfer's FlashAttention-3 for %s heads of %d: once, about a minute; "
                "kept in %s (FLASHINFER_WORKSPACE_BASE moves it)",
                *(str(dtype).removeprefix("torch."), head_dim, spec.get_library_path().parent),
            )
        return spec.build_and_load()
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"FlashInfer's kernels cannot be had: {error}. They are compiled once, by nvcc 12.3 or "
            "newer and ninja: put both on the path, or install the package flashinfer-jit-cache "
            f"{VERSION}, which has them"
        ) from error


def bound_launch(
    dtype: torch.dtype,
    head_dim: int,
    schedule: torch.Tensor,
    offsets: Sequence[int],
    key_slots: torch.Tensor | None,
) -> Callable[..., None]:
    """``launch(q, k, v, out, tail(scale))`` of one schedule, for all layers of a forward.

    With ``key_slots`` k and v are ``[pages, page_size, kv_heads, head_dim]``, and they are page
    numbers; else see ``flashinfer_prefill``.
    """
    module = kernel_module(dtype, head_dim)
    # Lengths and ends that the runs take besides the plan are read by none of them.
    run, keys = module.ragged_run, [schedule, schedule]
    if key_slots is not None:
        run, keys = module.paged_run, [schedule, schedule, key_slots, schedule]

    def launch(q: Any, k: Any, v: Any, out: Any, last: tuple[Any, ...]) -> None:
        run(schedule, schedule, offsets, q, k, v, *keys, out, *last)

    return launch


def tail(scale: float) -> tuple[Any, ...]:
    """The arguments that end a run: causal, the layout NHD, no window, no programmatic launch, and
    of the variant's own all but the scale left out."""
    return (None, 1, 0, -1, False, None, None, None, None, 0.0, scale, 1.0, 0)


def _on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: torch.Tensor,
    offsets: Sequence[int],
    key_slots: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    if key_slots is not None:
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    launch = bound_launch(q.dtype, q.shape[2], schedule, offsets, key_slots)
    launch(q, k, v, out, tail(scale))


def _on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: torch.Tensor,
    offsets: Sequence[int],
    key_slots: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    processors, tile = geometry(q.device, q.shape[2])
    groups = q.shape[1] // k.shape[1]
    ends = schedule[offsets[6] // 4 :][: processors + 1].tolist()
    table = torch.stack([schedule[at // 4 :][: ends[-1]] for at in offsets[:6]], 1).tolist()
    for begin, end in pairwise(ends):
        for at, query, key, queries, keys, head in table[begin:end]:
            stop = min((at + 1) * tile, queries)
            seen = torch.arange(key, key + keys)
            seen = seen if key_slots is None else key_slots[seen]
            rows = slice(query + at * tile, query + stop)
            position = torch.arange(at * tile, stop) + keys - queries
            hidden = torch.arange(keys) > position[:, None]
            scores = (q[rows, head].float() @ k[seen, head // groups].float().T) * scale
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[rows, head] = (weights @ v[seen, head // groups].float()).to(out.dtype)


_library.impl("flashinfer_prefill", _on_cpu, "CPU")
_library.impl("flashinfer_prefill", _on_cuda, "CUDA")
