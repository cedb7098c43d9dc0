"""The endpoints, one function a group."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ..batcher import Completion
from .bodies import AdapterBody, ChatBody, CompletionBody, Sampling
from .errors import error_response
from .folders import adapter_folder
from .service import Service


def openai_routes(service: Service) -> APIRouter:
    """Completions, chat and models, as OpenAI's clients ask for them."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Any:
        given: Any = body.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        prompts = [
            await asyncio.to_thread(service.encode, one) if isinstance(one, str) else one
            for one in (given if several else [given])
        ]
        found = await service.complete(request, body, prompts, body.max_tokens)
        choices = [
            {"index": i, "text": one.text, "finish_reason": one.finish_reason, "logprobs": None}
            for i, one in enumerate(found)
        ]
        return _answer("text_completion", body, prompts, found, choices)

    @router.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Any:
        template = service.batcher.chat_templates.get(body.model, service.tokenizer.chat_template)
        if template is None:
            raise HTTPException(422, "the model has no chat template; use /v1/completions")

        def render() -> list[int]:
            messages = [message.model_dump() for message in body.messages]
            text = service.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            return service.encode(text, special=False)  # the template writes them

        try:
            prompt = await asyncio.to_thread(render)
        except Exception as error:  # a template raises what it likes, for roles in an order that it does not take
            raise HTTPException(422, f"the model's chat template refuses these messages: {error}") from None
        found = await service.complete(request, body, [prompt], body.max_completion_tokens or body.max_tokens)
        choices = [
            {
                "index": 0,
                "message": {"role": "assistant", "content": one.text},
                "finish_reason": one.finish_reason,
                "logprobs": None,
            }
            for one in found
        ]
        return _answer("chat.completion", body, [prompt], found, choices)

    @router.get("/v1/models")
    async def models() -> Any:
        def one(name: str, parent: str | None) -> dict[str, Any]:
            return {
                "id": name,
                "object": "model",
                "created": service.started,
                "owned_by": "lowrank_kernels",
                "parent": parent,
            }

        return {
            "object": "list",
            "data": [one(service.model_name, None), *(one(name, service.model_name) for name in service.bank.names())],
        }

    return router


def _answer(kind: str, body: Sampling, prompts: Sequence[list[int]], found: list[Completion], choices: Any) -> Any:
    """The body of an answer in OpenAI's form, with the tokens it took."""
    prompt, generated = sum(len(p) for p in prompts), sum(len(one.tokens) for one in found)
    return {
        "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        },
    }


def adapter_routes(service: Service) -> APIRouter:
    """Adapters that come and go while the server runs."""
    router = APIRouter()

    @router.get("/v1/adapters")
    async def listed() -> Any:
        there = set(service.bank.resident())
        return {"adapters": [{"name": name, "resident": name in there} for name in service.bank.names()]}

    @router.post("/v1/adapters", status_code=201)
    async def load(body: AdapterBody) -> Any:
        if body.name == service.model_name:
            raise HTTPException(422, f"{body.name!r} is the name of the base model")
        try:
            folder = adapter_folder(service.adapters, body.folder)
            try:
                unused = await asyncio.to_thread(service.batcher.load, body.name, folder, pin=body.pin)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(str(error).replace(str(folder), body.folder)) from None
        except ValueError as error:
            service.metrics.add("lrk_adapter_loads_total", result="refused")
            raise HTTPException(422, str(error)) from None
        service.metrics.add("lrk_adapter_loads_total", result="loaded")
        return {"name": body.name} | ({} if unused is None else {"note": unused})

    @router.delete("/v1/adapters/{name}", status_code=204, response_class=Response)
    async def unload(name: str) -> None:
        try:
            service.bank.unload(name)
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        service.batcher.chat_templates.pop(name, None)

    return router


def health_routes(service: Service) -> APIRouter:
    """Whether the server answers, and what it has done."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Any:
        if not service.batcher.alive:
            return error_response(503, "the server is shutting down")
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def measured() -> str:
        gauges = {
            "lrk_waiting_rows": service.batcher.waiting,
            "lrk_running_rows": service.batcher.running,
            "lrk_adapters": len(service.bank.names()),
            "lrk_adapters_resident": len(service.bank.resident()),
            "lrk_adapter_bytes": service.bank.nbytes,
        }
        return service.metrics.text(
            gauges, {"lrk_batches_total": service.batcher.batches, "lrk_batch_rows_total": service.batcher.rows}
        )

    return router
