"""Requests that decode on a model runner by hand, through its request table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breakgraph.forward import ForwardBatch, ForwardMode
from breakgraph.runner import ForwardResult, ModelRunner
from breakgraph.server_args import ServerArgs


def make_runner(folder: Path, device: str, **flags: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "enable_breakable_cuda_graph": True,
        "cuda_graph_backend_decode": "full",
        "cuda_graph_bs": (1, 2, 4, 8),
        "piecewise_cuda_graph_tokens": (16, 64),
        "chunked_prefill_size": 64,
        "max_total_tokens": 1024,
        "max_running_requests": 10,
        "prefill_dispatch": "always",
        "max_prefill_padding": 8.0,
        "dtype": "float32" if device == "cpu" else "bfloat16",
    }
    return ModelRunner(ServerArgs(model_path=str(folder), device=device, **(settings | flags)))


@dataclass
class Decoder:
    """Requests in rows of ``runner.requests``; ``ids[row]`` are a request's tokens."""

    runner: ModelRunner
    ids: dict[int, list[int]] = field(default_factory=dict)

    def prefill(self, prompt: Sequence[int], **how: Any) -> tuple[int, ForwardResult]:
        """Run a prompt; returns its row."""
        table = self.runner.requests
        row = table.acquire()
        batch = ForwardBatch.from_requests([prompt], [table.extend(row, len(prompt))])
        self.ids[row] = list(prompt)
        return row, self.runner.forward(batch, **how)

    def batch(self, rows: Sequence[int], tokens: Sequence[int]) -> ForwardBatch:
        """A decode of ``tokens``, one for each of ``rows``."""
        table = self.runner.requests
        prefixes = [table.slots(row).copy() for row in rows]
        slots = [table.extend(row, 1) for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            self.ids[row].append(int(token))
        return ForwardBatch.from_requests(
            [[int(token)] for token in tokens],
            slots,
            prefixes,
            mode=ForwardMode.DECODE,
            rows=np.asarray(rows, np.int64),
        )

    def release(self, row: int) -> None:
        self.runner.requests.release(row)
        del self.ids[row]


def without_rows(batch: ForwardBatch) -> ForwardBatch:
    """The same decode as a prefill of one token a request."""
    return ForwardBatch(
        input_ids=batch.input_ids,
        out_cache_loc=batch.out_cache_loc,
        extend_lens=batch.extend_lens,
        prefix_lens=batch.prefix_lens,
        prefix_slots=batch.prefix_slots,
        mode=ForwardMode.DECODE,
    )


def assert_close(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Equal up to the order of sums."""
    assert got is not None and expected is not None
    exact = got.device.type == "cpu"
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if exact else {"rtol": 2e-2, "atol": 0.2}
    torch.testing.assert_close(got, expected, **tolerance)
