"""Prefill as breakable graphs: attention runs as eager breaks, on whatever batch there is.

No length of any request enters a segment, only the count of tokens: so a bucket serves every batch
of as many tokens.
"""

from __future__ import annotations

from breakgraph.runner.prefill_graph_runner import PrefillGraphRunner


class BreakableCudaGraphRunner(PrefillGraphRunner):
    """Replays prefills of any shape that fit one of the token buckets."""

    kind = "breakable"


class CapturedMixersRunner(BreakableCudaGraphRunner):
    """As that, with a hybrid's recurrent mixers captured, for as many requests as have slots."""

    kind = "captured"
