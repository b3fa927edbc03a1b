"""Why a request was not taken, or not answered."""

from __future__ import annotations


class QueueFullError(RuntimeError):
    """As many requests wait as may (``--max-queued-requests``); try again later."""


class EngineDeadError(RuntimeError):
    """The model thread has not started, has stopped, or has died of what the message says."""


class RequestFailedError(RuntimeError):
    """A request was taken and then ended without its result; the message says why."""
