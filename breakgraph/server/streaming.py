"""Server-sent events: what has begun well can still end badly, and then says so in an event."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from breakgraph.server.errors import ApiError

logger = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies pass tokens on at once


def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """An answer of one event a chunk, ended by ``[DONE]``."""

    async def events() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body)
        except Exception:
            logger.exception("a stream failed")
            yield _event(ApiError(500, "this request failed inside the server").body)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers=HEADERS)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
