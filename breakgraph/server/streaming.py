"""Server-sent events: what has begun well can still end badly, and then says so in an event."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from breakgraph.server.errors import ApiError

logger = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies pass tokens on at once


class EventStream(Response):
    """An answer of one event a chunk, ended by ``[DONE]``.

    It does not look out for a disconnect, as the gate does: that saves a task group a stream.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]]) -> None:
        self.status_code, self.background, self._chunks = 200, None, chunks
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for chunk in self._chunks:
                await send(_event(chunk))
        except ApiError as error:
            await send(_event(error.body))
        except Exception:
            logger.exception("a stream failed")
            await send(_event(ApiError(500, "this request failed inside the server").body))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _event(data: dict[str, Any]) -> Message:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    body = f"data: {text}\n\n".encode("utf-8", "replace")  # a lone surrogate is no character
    return {"type": "http.response.body", "body": body, "more_body": True}
