"""Prefill as graphs without a break: attention and recurrent mixers are captured with the rest.

Lengths lie in device memory, where each replay's plan puts them, with a slot for each of so many
requests; slots past the batch are empty. A prefill is then one launch, and the price is that the
batch must be one that the slots can hold: no more requests, and no cached prefix where the backend
finds none.
"""

from __future__ import annotations

from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner


class FullCudaGraphRunner(PrefillGraphRunner):
    """Replays prefills that its backend's plan can hold and that fit one of the buckets."""

    kind = "full"
    off_flag = "with --cuda-graph-backend-prefill breakable"
