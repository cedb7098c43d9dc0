"""Errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

_MAX_MESSAGE = 1000  # characters, so that no answer is long because its request was


class ErrorDetail(BaseModel):
    """What was wrong: in words, of what type, with which field of the body, and a code that programs compare."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than the one asked for.

    Args:
        status: of HTTP.
        message: one sentence for the person who reads it.
        param: the field of the body that is at fault.
        code: for programs, such as "model_not_found".
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The error as the body of an answer."""
        return _body(self.status_code, str(self.detail), self.param, self.code)


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    short = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."
    return {"error": {"message": short, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's form, with ``Retry-After`` where the request may be sent again."""
    said = dict(headers or {}) | ({"Retry-After": "1"} if status in (429, 503) else {})
    return JSONResponse(_body(status, message, param, code), status, said)


def add_handlers(app: FastAPI) -> None:
    """Answer requests that are refused, and that raise anything else."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        param, code, headers = getattr(error, "param", None), getattr(error, "code", None), dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_methods(app, request)))
        return error_response(error.status_code, str(error.detail), param=param, code=code, headers=headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return error_response(500, f"{type(error).__name__} in the server")  # the log has the rest


def _methods(app: FastAPI, request: Request) -> set[str]:
    """What the path of a request takes: Starlette tells of one route alone, where several share a path."""
    routes = [r for r in app.routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes for method in route.methods or ()}
