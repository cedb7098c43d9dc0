"""Answers that come in pieces: server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response

from .answers import Answer
from .errors import ApiError
from .service import RowEvents, disconnected


class EventStream(Response):
    """What rows say, as they say it; a client that goes ends them at once.

    A stream in which nothing has come for a while has a comment. One that fails ends with an error in OpenAI's form
    as its last event but ``[DONE]``, since its status has been sent.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, rows: RowEvents, note: Any) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answer, self._rows, self._note = answer, rows, note

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone, said = asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(self._say(send))
        try:
            await asyncio.wait([gone, said], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the server ends, and its grace is over
            said.cancel()
            await asyncio.gather(said, return_exceptions=True)
            await self._end(send, ApiError(503, "the server is shutting down"))
        finally:
            self._rows.close()
            gone.cancel()
            said.cancel()
            self._note(self._answer)
        await asyncio.gather(said, return_exceptions=not said.done() or said.cancelled())

    async def _say(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        answer, failed = self._answer, None
        try:
            await self._tell(send, answer.begin())
            async for event in self._rows:
                if event is None:
                    await self._write(send, ": still here")
                else:
                    await self._tell(send, answer.chunks(*event))
            if answer.body.usage_at_end:
                await self._tell(send, iter([answer.last()]))
        except ApiError as error:
            failed = error
        await self._end(send, failed)

    async def _end(self, send: Any, error: ApiError | None) -> None:
        if error is not None:
            await self._tell(send, iter([error.body()]))
        await self._write(send, "data: [DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, send: Any, chunks: Iterator[dict[str, Any]]) -> None:
        for chunk in chunks:
            await self._write(send, f"data: {json.dumps(chunk, ensure_ascii=False)}")

    async def _write(self, send: Any, event: str) -> None:
        await send({"type": "http.response.body", "body": f"{event}\n\n".encode(), "more_body": True})
