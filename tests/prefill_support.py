"""Prefills on a model runner by hand: batches on random slots, replayed and run eagerly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models_support import VOCAB, poison

from breakgraph.forward import ForwardBatch
from breakgraph.runner import DispatchReason, ModelRunner
from breakgraph.server_args import ServerArgs

BUCKETS = (16, 32, 64, 128)
SLOTS = 512
REQUEST_SLOTS = 4
FULL: dict[str, Any] = {
    "enable_breakable_cuda_graph": False,
    "cuda_graph_backend_prefill": "full",
    "prefill_graph_requests": REQUEST_SLOTS,
}
AUTO = {**FULL, "cuda_graph_backend_prefill": "auto"}


def make_runner(folder: Path, device: str, **flags: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "enable_breakable_cuda_graph": True,
        "piecewise_cuda_graph_tokens": BUCKETS,
        "chunked_prefill_size": BUCKETS[-1],
        "max_total_tokens": SLOTS,
        "max_running_requests": 16,
        "prefill_dispatch": "always",
        "dtype": "float32" if device == "cpu" else "bfloat16",
    }
    return ModelRunner(ServerArgs(model_path=str(folder), device=device, **(settings | flags)))


def make_batch(
    lengths: Sequence[tuple[int, int]], seed: int = 0, num_slots: int = SLOTS, **fields: Any
) -> ForwardBatch:
    """Requests of ``(new, prefix)`` tokens on random slots of a pool that is full of noise."""
    draw = np.random.default_rng(seed)
    slots = draw.permutation(num_slots) + 1
    ends = np.cumsum([new + prefix for new, prefix in lengths])
    rows = [slots[end - sum(both) : end] for end, both in zip(ends, lengths, strict=True)]
    return ForwardBatch.from_requests(
        [draw.integers(0, VOCAB, new).tolist() for new, _ in lengths],
        [row[prefix:] for row, (_, prefix) in zip(rows, lengths, strict=True)],
        [row[:prefix] for row, (_, prefix) in zip(rows, lengths, strict=True)],
        **fields,
    )


def plain(lengths: Sequence[int], seed: int = 0) -> ForwardBatch:
    """Requests without a cached prefix."""
    return make_batch([(length, 0) for length in lengths], seed)


def assert_replay_equals_eager(runner: ModelRunner, batch: ForwardBatch) -> None:
    eager = runner.forward(batch, allow_graph=False).next_token_logits
    poison(runner)
    result = runner.forward(batch)
    assert result.dispatch.reason is DispatchReason.REPLAYED
    assert eager is not None and result.next_token_logits is not None
    if runner.device.type == "cpu":
        torch.testing.assert_close(result.next_token_logits, eager, rtol=1e-5, atol=1e-5)
    elif result.dispatch.bucket == batch.num_tokens:
        assert torch.equal(result.next_token_logits, eager)
    else:
        torch.testing.assert_close(result.next_token_logits, eager, rtol=2e-2, atol=0.15)
