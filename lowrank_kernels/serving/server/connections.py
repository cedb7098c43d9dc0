"""Connections: how many there may be, how long the head of a request may take, and how a server of them ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..engine import Engine

_BUSY_BODY = b'{"error": {"message": "too many connections", "type": "server_error", "param": null, "code": null}}'
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_BUSY_BODY), _BUSY_BODY)
)


def bounded_protocol(max_connections: int, head_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol with a limit on connections and a time within which the head of a request has to come.

    A connection too many is answered 503 and closed; one whose next head is not whole ``head_seconds`` after its
    first byte (the first of the connection: after it was opened) is closed. So is one whose body is not whole when the
    server ends.
    """

    class BoundedProtocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.write(_BUSY)
                transport.close()
            else:
                self._head = self.loop.call_later(head_seconds, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            between = self.cycle is None or self.cycle.response_complete
            if between and self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(head_seconds, self.transport.close)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._head_is_there()

        def shutdown(self) -> None:
            if self.cycle is not None and self.cycle.more_body:  # half of a body: nothing of it is being done
                self.transport.close()
            super().shutdown()

        def _head_is_there(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

    return BoundedProtocol


def run_server(
    app: FastAPI, engine: Engine, listener: socket.socket, *, max_connections: int, head_seconds: float, grace: int
) -> None:
    """Serve until a signal, or until the engine dies; requests that run then have ``grace`` seconds to end.

    Args:
        app: of ``create_app``.
        engine: under it.
        listener: a socket that listens.
    """
    config = uvicorn.Config(
        app,
        http=bounded_protocol(max_connections, head_seconds),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    server = uvicorn.Server(config)

    def end(_: BaseException) -> None:
        server.should_exit = True

    engine.on_failure = end
    server.should_exit = engine.failed is not None
    # uvicorn raises the signal that ended it once more when it is done: by then that shall do nothing.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
