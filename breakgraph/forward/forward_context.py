"""The one active batch, scoped by a context manager that refuses to nest.

A break finds the live batch's plan here, at capture and at replay alike; nothing about a
request reaches it by argument, so nothing about a request can be frozen into a graph.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from breakgraph.forward.forward_batch import ForwardBatch

if TYPE_CHECKING:
    from breakgraph.attention.base import AttentionBackend


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """The live batch, and the attention backend that has planned it."""

    batch: ForwardBatch
    attn_backend: AttentionBackend


class _Local(threading.local):
    context: ForwardContext | None = None


_local = _Local()


def get_forward_context() -> ForwardContext:
    """The active context. Raises RuntimeError outside ``forward_context``."""
    context = _local.context
    if context is None:
        raise RuntimeError(
            "no forward is running: attention and other mixers read the live batch, so call "
            "the model inside `with forward_context(batch, backend)`"
        )
    return context


class forward_context:
    """Make ``batch`` the live one for this thread. Raises RuntimeError if one is live already."""

    __slots__ = ("_context",)

    def __init__(self, batch: ForwardBatch, attn_backend: AttentionBackend) -> None:
        self._context = ForwardContext(batch, attn_backend)

    def __enter__(self) -> None:
        if _local.context is not None:
            raise RuntimeError("a forward is already running in this thread; contexts do not nest")
        _local.context = self._context

    def __exit__(self, *error: object) -> None:
        _local.context = None
