"""Breakable piecewise CUDA graphs for LLM prefill.

Importing this package imports nothing else: each public name is loaded at its first use, so
the package imports where there is no GPU, no triton and no cuda-python.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

__version__ = "0.1.0"

STARTED = time.perf_counter()
"""About when the process began, where this package is what it imports first."""

_HOME = {
    "BreakableCUDAGraph": "graph",
    "BreakableCUDAGraphCapture": "graph",
    "Engine": "engine",
    "PrefillResult": "engine",
    "ServerArgs": "server_args",
    "break_graph": "graph",
    "eager_on_graph": "graph",
    "enable_breakable_cuda_graph": "graph",
    "is_in_breakable_cuda_graph": "graph",
    "wrap": "engine",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'breakgraph' has no attribute {name!r}")
    return getattr(importlib.import_module(f"breakgraph.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
