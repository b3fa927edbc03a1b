"""What can go wrong with a breakable graph. Each message says what to do instead."""

from __future__ import annotations


class BreakableGraphError(RuntimeError):
    """A breakable graph was captured or replayed in a way that it cannot serve."""


class RefusedOpError(BreakableGraphError):
    """A segment ran an op that no graph can hold: a host sync, a shape that depends on data."""


class RefusedArgumentError(BreakableGraphError, TypeError):
    """A break was given an argument that the capture would freeze."""


class ForeignReadError(BreakableGraphError):
    """A segment, or a break's argument, reads a tensor that goes stale at replay."""


class LayoutChangedError(BreakableGraphError):
    """A break returned something else at replay than at capture."""


class UnjoinedStreamError(BreakableGraphError):
    """A stream forked in a segment was not joined before the segment ended."""
