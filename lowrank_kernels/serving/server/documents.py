"""What the OpenAPI document says of an endpoint: its body, and every status that it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from .bodies import Body
from .errors import ErrorBody

_STATUSES = {
    400: "The request is not one that can be served.",
    401: "The key is missing or wrong.",
    403: "The host, or the page that asks, is not allowed.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "The queue is full.",
    500: "The server failed.",
    503: "The server is shutting down.",
}
_ALWAYS = (401, 403, 408, 413, 500)


def documented(*statuses: int, body: type[Body] | None = None, streams: bool = False) -> dict[str, Any]:
    """The keywords of a route: its body, its errors beside those that every endpoint has."""
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}}}
    responses: dict[int | str, Any] = {
        status: {"content": error, "description": _STATUSES[status]} for status in sorted({*statuses, *_ALWAYS})
    }
    if streams:
        responses[200] = {"description": "The answer; its pieces if ``stream``.", "content": {"text/event-stream": {}}}
    if body is None:
        return {"responses": responses}
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {"responses": responses, "openapi_extra": extra}


def describe(app: FastAPI, bodies: Sequence[type[Body]]) -> None:
    """Have ``app.openapi()`` tell of bodies and errors too, which the endpoints read and answer themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            kinds: list[type[BaseModel]] = [*bodies, ErrorBody]
            for kind in kinds:
                schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= schema.pop("$defs", {}) | {kind.__name__: schema}
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # FastAPI's own, which nothing here answers
            for of_fastapi in ("HTTPValidationError", "ValidationError"):
                schemas.pop(of_fastapi, None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
