"""The HTTP server over a :class:`Batcher`: OpenAI's completions, chat and models; adapters come and go; metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from ..batcher import Batcher
from .bodies import AdapterBody, ChatBody, CompletionBody
from .errors import add_handlers
from .folders import adapter_folder, is_adapter, load_all
from .limits import BodyLimit
from .metrics import CountRequests
from .routes import adapter_routes, health_routes, openai_routes
from .service import Service

__all__ = ["AdapterBody", "ChatBody", "CompletionBody", "adapter_folder", "create_app", "is_adapter", "load_all"]


def create_app(batcher: Batcher, model_name: str, adapters: Path, *, max_body_bytes: int = 1 << 20) -> FastAPI:
    """The application; it closes the batcher when it shuts down, after what was queued is done.

    Args:
        batcher: over the bank whose adapters are served.
        model_name: the base's, which no adapter may have.
        adapters: the folder below which ``POST /v1/adapters`` finds its folders.
        max_body_bytes: of a request.

    Status codes: 404 for a model that is not there, 413 for a body too large, 422 for a request that cannot be
    served as it is (tokens over the limit, unknown fields, a folder that holds no good adapter), 429 for a full queue,
    503 when shutting down, each with an error in OpenAI's form.
    """
    service = Service(batcher, model_name, adapters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="lowrank_kernels", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    app.add_middleware(CountRequests, metrics=service.metrics)
    add_handlers(app)
    for routes in (openai_routes, adapter_routes, health_routes):
        app.include_router(routes(service))
    return app
