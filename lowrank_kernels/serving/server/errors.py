"""Errors in OpenAI's form."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException


def error_response(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def add_handlers(app: FastAPI) -> None:
    """Answer requests that fail to validate, that are refused, and that raise anything else."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        said = {f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors()}
        return error_response(422, "; ".join(sorted(said)))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return error_response(500, f"{type(error).__name__} in the server")  # the log has the rest
