"""Refuses what shows in no op: a segment that reads a tensor of the host.

The methods are wrapped on ``torch.Tensor`` while at least one capture is under way, and refuse in
the segments of their own thread's capture; what the code of an op reads is its own affair. A
function mode would see each ``tensor.shape`` too, which took a fifth of the capture of 36 layers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from breakgraph.graph.callsite import call_site
from breakgraph.graph.errors import RefusedOpError

_READS = ("tolist", "numpy", "__array__", "__repr__", "cpu")


class HostReadWatch:
    """A context in which host reads are refused in this thread whenever ``watching()``."""

    _lock = threading.Lock()
    _open = 0
    _own: dict[str, Any]
    _local = threading.local()

    def __init__(self, watching: Callable[[], bool]) -> None:
        self._watching = watching

    def __enter__(self) -> HostReadWatch:
        cls = HostReadWatch
        with cls._lock:
            cls._open += 1
            if cls._open == 1:
                cls._own = {name: vars(torch.Tensor).get(name) for name in _READS}
                for name in _READS:
                    setattr(torch.Tensor, name, _refusing(getattr(torch.Tensor, name)))
        cls._local.watching = self._watching
        return self

    def __exit__(self, *exc: object) -> None:
        cls = HostReadWatch
        cls._local.watching = None
        with cls._lock:
            cls._open -= 1
            if cls._open == 0:
                for name, own in cls._own.items():
                    if own is None:
                        delattr(torch.Tensor, name)  # inherited
                    else:
                        setattr(torch.Tensor, name, own)


def _refusing(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def read(*args: Any, **kwargs: Any) -> Any:
        watching = getattr(HostReadWatch._local, "watching", None)
        if watching is not None and watching():
            raise RefusedOpError(
                f"Tensor.{plain.__name__}() copies to the host and waits ({call_site()}); a graph "
                "segment cannot hold it. Move it into an eager_on_graph break."
            )
        return plain(*args, **kwargs)

    return read
