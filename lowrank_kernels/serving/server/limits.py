"""The largest body that the server reads, and how long it waits for one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import error_response


class BodyLimit:
    """ASGI middleware: reads the whole body, then hands the request on.

    Answers 413 to a body of more than ``limit`` bytes, by its content-length or as it arrives, and 408 to one that has
    not come after ``seconds``.
    """

    def __init__(self, app: Any, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            body = None if not said.isdigit() or int(said) > self.limit else await self._read(receive)
        except asyncio.TimeoutError:
            late = error_response(
                408, f"expected the body within {self.seconds:g} seconds", headers={"Connection": "close"}
            )
            return await late(scope, receive, send)
        except _Gone:
            return None
        if body is None:
            return await error_response(413, f"expected a body of at most {self.limit} bytes")(scope, receive, send)
        given = False

        async def whole() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, whole, send)

    async def _read(self, receive: Callable[[], Awaitable[Any]]) -> bytes | None:
        """The body; None where it is too large."""

        async def all_of_it() -> bytes | None:
            parts, size = [], 0
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise _Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.limit:
                    return None
                if not message.get("more_body", False):
                    return b"".join(parts)

        return await asyncio.wait_for(all_of_it(), self.seconds)


class _Gone(Exception):
    """The client has closed the connection."""
