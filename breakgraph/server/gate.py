"""Every request passes here: nothing behind this gate meets a stranger, half a body or a ghost.

A handler runs with a whole body of bounded size, is cancelled when its client goes away, and
when it ends, however it ends, whatever it still has running in the engine is aborted.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from breakgraph.server.errors import ApiError

logger = logging.getLogger(__name__)

# A client that is refused while it still sends sees a broken connection, not the refusal. So up to
# this many times the limit is read and thrown away first.
DISCARD = 8


class Abortable(Protocol):
    """What a request has running in the engine; aborting what has ended does nothing."""

    def abort(self) -> None: ...


class Gate:
    """ASGI middleware around the whole application.

    Attributes:
        in_flight: requests being answered, health and metrics not counted.
        draining: set when the server is about to end; from then on requests get a 503.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        observe: Callable[[str, int, float], None],
    ) -> None:
        self._app, self._key, self._max_body = app, api_key, max_body_bytes
        self._observe = observe
        self.in_flight = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # the client went away before there was one

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        running: list[Abortable] = []
        scope["state"] = {"began": began, "running": running}
        counted = scope["path"] not in ("/health", "/metrics")
        self.in_flight += counted
        try:
            refusal = self._refusal(scope)
            body = await self._read(Headers(scope=scope), receive, keep=refusal is None)
            if refusal is not None:
                raise refusal
            if body is not None:
                await self._run(scope, body, receive, sending)
        except ApiError as error:
            response = error.response()
            if error.status == 413:
                response.headers["connection"] = "close"
            if error.status == 401 and scope["path"] == "/":  # a browser asks for the key then
                response.headers["www-authenticate"] = 'Basic realm="breakgraph: key as password"'
            await response(scope, receive, sending)
        finally:
            self.in_flight -= counted
            for stream in running:
                stream.abort()
            route = scope.get("route")
            path = getattr(route, "path", "unknown")
            self._observe(path, status, time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        if self._key is not None and path != "/health":
            given = _key_in(Headers(scope=scope).get("authorization", ""))
            if not hmac.compare_digest(given, self._key.encode()):
                return ApiError(
                    401,
                    "this server needs its API key: send 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
        if self.draining and path not in ("/health", "/metrics"):
            return ApiError(503, "this server is shutting down; ask another", code="shutting_down")
        return None

    async def _read(self, headers: Headers, receive: Receive, *, keep: bool) -> bytes | None:
        """The whole body, if it is to be kept; None when the client left before it was here."""
        announced = headers.get("content-length", "0")
        size = int(announced) if announced.isdecimal() else 0
        parts: list[bytes] = []
        total, more, most = 0, True, DISCARD * self._max_body
        while more and max(total, size) <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            total += len(part)
            if keep and max(total, size) <= self._max_body:
                parts.append(part)
            else:
                parts.clear()
            more = message.get("more_body", False)
        if max(total, size) > self._max_body:
            raise ApiError(
                413,
                f"the body has more than the {self._max_body} bytes that --max-body-bytes allows",
                code="body_too_large",
            )
        return b"".join(parts)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application; cancel it as soon as the client is gone."""
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # the gate itself looks out for a disconnect
            raise RuntimeError("unreachable")

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        app = asyncio.ensure_future(self._app(scope, replay, send))
        watcher: asyncio.Future[Any] = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({app, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not app.done():
                app.cancel()
            with suppress(asyncio.CancelledError):
                await app
        finally:
            for task in (app, watcher):
                task.cancel()


def _key_in(authorization: str) -> bytes:
    """The key of a Bearer header, or the password of a Basic one, as browsers send it."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # as headers are decoded: these are its bytes
    if scheme.lower() == "basic":
        with suppress(binascii.Error, ValueError):
            return base64.b64decode(value.strip()).partition(b":")[2]
    return b""
