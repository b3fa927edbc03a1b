"""How long a start took, in one line: the whole since the process began, and its largest parts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import breakgraph

if TYPE_CHECKING:
    from breakgraph.runner import ModelRunner


def ready_text(runner: ModelRunner, imported: float) -> str:
    """``ready in 9.3 s (imports 2.9, weights 1.2, capture 4.1)``.

    Args:
        runner: that is ready now.
        imported: when the imports were done, by ``time.perf_counter()``.
    """
    parts = {
        "imports": imported - breakgraph.STARTED,
        "weights": runner.load_seconds,
        "capture": sum(graphs.capture_seconds for graphs in runner.graph_runners),
    }
    text = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return f"ready in {time.perf_counter() - breakgraph.STARTED:.1f} s ({text})"
