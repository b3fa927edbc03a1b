"""Sockets and the end of the server: no peer, alive or dead, is waited for without a bound.

A request must arrive whole within ``RECEIVE_SECONDS``; a client that reads nothing of an answer
for ``SEND_SECONDS`` is cut off; a peer that vanished without a word is found by TCP keep-alive. A
cut connection cancels its request.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from breakgraph.server.gate import Gate

logger = logging.getLogger(__name__)

RECEIVE_SECONDS = 30.0
SEND_SECONDS = 30.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, seconds, probes


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a bound on what a peer can make it wait for."""

    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._watch_receiving()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_receiving()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._sending is None:
            self._sending = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sending = self._cancelled(self._sending)

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiving = self._cancelled(self._receiving)
        self._sending = self._cancelled(self._sending)
        super().connection_lost(exc)

    def _watch_receiving(self) -> None:
        """Arm the timer with a request's first byte, or the connection's; disarm at its last."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._receiving = self._cancelled(self._receiving)
        elif self._receiving is None:
            self._receiving = self.loop.call_later(RECEIVE_SECONDS, self.transport.abort)

    @staticmethod
    def _cancelled(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


class DrainingServer(uvicorn.Server):
    """On the first signal finishes what runs and refuses what comes; on a second one ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        drain_seconds: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._gate, self._drain_seconds, self._on_ready = gate, drain_seconds, on_ready
        self._until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._until is not None:
            self.should_exit = self.force_exit = True
            return
        self._until = time.monotonic() + self._drain_seconds
        self._gate.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None:
            if counter % 50 == 0 and self._gate.in_flight:
                logger.info("finishing %d requests", self._gate.in_flight)
            if not self._gate.in_flight or time.monotonic() > self._until:
                return True
        return await super().on_tick(counter)


def make_server(
    gate: Gate, *, drain_seconds: float, log_level: str, on_ready: Callable[[], None]
) -> DrainingServer:
    """A server for what is behind ``gate``; give its ``run`` the bound socket."""
    config = uvicorn.Config(
        gate,
        http=BoundedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        log_level="debug" if log_level == "debug" else "warning",
        access_log=log_level == "debug",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    return DrainingServer(config, gate, drain_seconds, on_ready)
