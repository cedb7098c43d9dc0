"""The HTTP server over an :class:`~lowrank_kernels.serving.Engine`: what clients of OpenAI and vLLM ask for.

Adapters come and go while it runs. ``lrk serve`` runs it; :func:`create_app` makes the application.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ..engine import Engine
from .documents import describe
from .errors import ErrorBody, add_handlers
from .folders import adapter_folder, is_adapter, load_all
from .guard import Guard, KeyCheck
from .limits import BodyLimit
from .metrics import Observer
from .routes import BODIES, add_adapter_routes, add_health_routes, add_openai_routes, add_token_routes
from .service import Service
from .state import State

__all__ = ["ErrorBody", "Safety", "State", "adapter_folder", "create_app", "is_adapter", "load_all"]


@dataclass(frozen=True)
class Safety:
    """Who may ask, and how much.

    Args:
        hosts: names that requests may be for; addresses need no leave. "*" for any.
        origins: of other sites' pages that may ask. "*" for any.
        keys: any of which a request has to bring; none: everyone may ask.
        max_body_bytes: of a request.
        body_seconds: for a body to come.
    """

    hosts: Collection[str] = ("localhost",)
    origins: Collection[str] = ()
    keys: Collection[str] = ()
    max_body_bytes: int = 1 << 20
    body_seconds: float = 30.0


def create_app(
    engine: Engine,
    model_name: str,
    adapters: Path,
    *,
    safety: Safety | None = None,
    strict: bool = False,
    state: State | None = None,
) -> FastAPI:
    """The application; it closes the engine when it shuts down, after what was queued is done.

    Args:
        engine: over the bank whose adapters are served.
        model_name: the base's, which no adapter may have.
        adapters: the folder below which adapters to load are found.
        safety: default: of this machine alone, without a key.
        strict: refuse fields that are not known, instead of ignoring them.
        state: where the adapters that are loaded and unloaded are noted.

    Every error has OpenAI's form (:class:`ErrorBody`); ``GET /openapi.json`` says which status an endpoint answers.
    """
    safety = safety or Safety()
    service = Service(engine, model_name, adapters, strict=strict, state=state)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="lowrank_kernels", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    # The last one added is the first that a request meets.
    app.add_middleware(BodyLimit, limit=safety.max_body_bytes, seconds=safety.body_seconds)
    app.add_middleware(KeyCheck, keys=safety.keys)
    if safety.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(safety.origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guard, hosts=safety.hosts, origins=safety.origins)
    app.add_middleware(Observer, metrics=service.metrics)
    add_handlers(app)
    for add in (add_openai_routes, add_adapter_routes, add_token_routes, add_health_routes):
        add(app, service)
    describe(app, BODIES)
    return app
