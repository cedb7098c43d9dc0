"""The largest body that the server reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .errors import error_response


class BodyLimit:
    """ASGI middleware: answers 413 to a body of more than ``limit`` bytes, by its content-length or as it arrives."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self.limit:
            return await self._refuse(scope, receive, send)
        # Read the whole body here, so that what follows gets one within the limit.
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client is gone
            body += message.get("body", b"")
            if len(body) > self.limit:
                return await self._refuse(scope, receive, send)
            if not message.get("more_body", False):
                break
        given = False

        async def whole() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, whole, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        await error_response(413, f"expected a body of at most {self.limit} bytes")(scope, receive, send)
