"""Decode as graphs: one per batch size, attention captured with the rest.

A decode's shape is its number of requests. Lengths, slots and rows of the request table are read
from device memory by the captured kernels, so a graph has one segment and no break, unless it is
asked to break where the model is marked ``eager_on_graph``.
"""

from __future__ import annotations

import numpy as np

from breakgraph.forward import ForwardBatch, ForwardMode
from breakgraph.runner.buckets import Dispatch, decide_decode
from breakgraph.runner.graph_runner import GraphRunner


class DecodeCudaGraphRunner(GraphRunner):
    """Replays one step of up to ``buckets[-1]`` requests, whatever their lengths."""

    phase, unit = "decode", "request"
    off_flag = "with --cuda-graph-backend-decode disabled"
    memory_flags = "the largest batch with --cuda-graph-bs or --max-running-requests"

    def can_run(self, batch: ForwardBatch) -> Dispatch:
        return decide_decode(batch.num_tokens, self.buckets, has_rows=batch.rows is not None)

    def dummy(self, bucket: int) -> ForwardBatch:
        zeros = np.zeros(bucket, np.int64)
        return ForwardBatch(
            input_ids=zeros,
            out_cache_loc=zeros,
            extend_lens=np.ones(bucket, np.int32),
            prefix_lens=np.zeros(bucket, np.int32),
            prefix_slots=zeros[:0],
            mode=ForwardMode.DECODE,
        )

    def _warm_up_buckets(self) -> tuple[int, ...]:
        return self.buckets  # the attention kernel is compiled by batch size
