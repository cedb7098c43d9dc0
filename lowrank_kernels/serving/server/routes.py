"""The endpoints, one function a group."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ..engine import Constraint, Generation
from .answers import Answer, ChatAnswer, TextAnswer
from .bodies import (
    MOST_ROWS,
    AdapterBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadLoRABody,
    Sampling,
    TokenizeBody,
    UnloadLoRABody,
    read_body,
)
from .documents import documented
from .errors import ApiError
from .events import EventStream
from .folders import adapter_folder
from .service import Service
from .tools import OneCall, Plain, TaggedCalls, call_schema

BODIES = (AdapterBody, ChatBody, CompletionBody, DetokenizeBody, LoadLoRABody, TokenizeBody, UnloadLoRABody)
_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI has it


# ------------------------------------------------------------------------------------------------------- completions


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Completions, chat and models, as OpenAI's clients ask for them."""
    answering = (400, 404, 429, 503)

    @app.post("/v1/completions", **documented(*answering, body=CompletionBody, streams=True))
    async def completions(request: Request) -> Any:
        body = await read_body(request, CompletionBody, service.strict)
        adapter = service.adapter(body.model)
        texts = [one if isinstance(one, str) else "" for one in body.prompt]
        prompts = [await service.read(service.tokens, one) if isinstance(one, str) else one for one in body.prompt]
        if body.echo:
            for i, one in enumerate(body.prompt):
                if not isinstance(one, str):
                    texts[i] = await service.read(service.text, one)
        most = _COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
        jobs = await _jobs(body, adapter, prompts, most)
        for job in jobs:
            job.logprobs, job.prompt_logprobs = body.logprobs, body.echo and body.logprobs is not None
        answer = TextAnswer(body, body.model or service.model_name, prompts, texts, service.tokenizer)
        return await _reply(service, request, answer, jobs)

    @app.post("/v1/chat/completions", **documented(*answering, body=ChatBody, streams=True))
    async def chat(request: Request) -> Any:
        body = await read_body(request, ChatBody, service.strict)
        adapter = service.adapter(body.model)
        tools = [] if body.tool_choice == "none" else body.tools
        render = partial(service.render, body.model, body.messages, tools, settings=body.chat_template_kwargs)
        prompt = await service.read(render)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        schema = call_schema(body)
        jobs = await _jobs(body, adapter, [prompt], most, schema)
        for job in jobs:
            job.logprobs = body.top_logprobs if body.logprobs else None
        tagged = bool(tools) and TaggedCalls.known(service.template(body.model) or "")
        reader: type[Plain] = OneCall if schema is not None else TaggedCalls if tagged else Plain
        answer = ChatAnswer(body, body.model or service.model_name, prompt, reader, service.tokenizer)
        return await _reply(service, request, answer, jobs)

    async def _jobs(
        body: Sampling,
        adapter: str | None,
        prompts: Sequence[list[int]],
        most: int | None,
        schema: dict[str, Any] | None = None,
    ) -> list[Generation]:
        """``body.n`` rows for each prompt."""
        if len(prompts) * body.n > MOST_ROWS:
            raise ApiError(400, f"n: expected at most {MOST_ROWS} rows, prompts times n", param="n")
        constraint = await _constraint(service, body, schema)
        return [
            Generation(
                adapter,
                prompt,
                most,
                stop=tuple(body.stop),
                stop_token_ids=tuple(body.stop_token_ids),
                ignore_eos=body.ignore_eos,
                min_tokens=body.min_tokens,
                include_stop=body.include_stop_str_in_output,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(0, body.top_k),
                min_p=body.min_p,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                repetition_penalty=body.repetition_penalty,
                logit_bias=body.logit_bias,
                seed=None if body.seed is None else (body.seed + row) % 2**63,
                constraint=constraint,
                priority=body.priority,
            )
            for row, prompt in enumerate(prompt for prompt in prompts for _ in range(body.n))
        ]

    def one_model(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "lowrank_kernels",
            "root": name,
            "parent": parent,
            "max_model_len": service.engine.max_length,
        }

    @app.get("/v1/models", **documented())
    async def models() -> Any:
        adapters = [one_model(name, service.model_name) for name in service.bank.names()]
        return {"object": "list", "data": [one_model(service.model_name, None), *adapters]}

    @app.get("/v1/models/{name}", **documented(404))
    async def model(name: str) -> Any:
        return one_model(name, None if service.adapter(name) is None else service.model_name)


async def _reply(service: Service, request: Request, answer: Answer, jobs: Sequence[Generation]) -> Any:
    """The answer, whole or as a stream."""

    def note(answer: Answer) -> None:
        name, prompt = jobs[0].adapter or service.model_name, sum(map(len, answer.prompts))
        request.state.note = f"model={name} prompt={prompt} generated={answer.generated}"

    if answer.body.stream:
        return EventStream(answer, service.stream(jobs), note)
    found = await service.complete(request, jobs)
    if answer.body.max_tokens == 0:  # the prompt's log-probabilities alone; a row has a token at least
        found = [one._replace(tokens=[], text="", logprobs=[], finish_reason="length") for one in found]
    whole = answer.whole(found)
    note(answer)
    return whole


async def _constraint(service: Service, body: Sampling, schema: dict[str, Any] | None) -> Constraint | None:
    """What the text of a row has to be: a call, or what ``response_format`` or vLLM's settings say.

    Raises:
        ApiError: 400, a schema or pattern that no grammar can be made of.
    """
    given, said = body.structured_outputs, body.response_format
    choice = body.guided_choice or (given and given.choice)
    pattern = body.guided_regex or (given and given.regex)
    wanted: Any = schema if schema is not None else body.guided_json or (given and given.json_)
    if wanted is None and said is not None and said.type == "json_schema":
        if said.json_schema is None:
            raise ApiError(400, "response_format: expected json_schema", param="response_format")
        wanted = said.json_schema.schema_
    if choice:
        pattern = "|".join(re.escape(one) for one in choice)
    if wanted is not None:
        make = partial(Constraint.json_schema, service.tokenizer, wanted)
    elif pattern:
        make = partial(Constraint.regex, service.tokenizer, pattern)
    elif (said is not None and said.type == "json_object") or (given is not None and given.json_object):
        make = partial(Constraint.json_object, service.tokenizer)
    else:
        return None
    try:
        return await asyncio.to_thread(make)
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise ApiError(400, f"no grammar can be made of this: {error}", param="response_format") from None


# ----------------------------------------------------------------------------------------------------------- adapters


def add_adapter_routes(app: FastAPI, service: Service) -> None:
    """Adapters that come and go while the server runs, by our paths and by vLLM's."""

    changing = asyncio.Lock()  # the file of the state tells of changes in the order that they were made

    async def load(name: str, folder: str, pin: bool = False) -> str | None:
        if name == service.model_name:
            raise ApiError(400, f"{name!r} is the name of the base model")
        try:
            path = adapter_folder(service.adapters, folder)
            try:
                async with changing:
                    unused = await asyncio.to_thread(service.engine.load, name, path, pin=pin)
                    if service.state is not None:
                        await asyncio.to_thread(service.state.note, name, folder, pin)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(str(error).replace(str(path), folder)) from None
        except ValueError as error:
            service.metrics.loads.labels("refused").inc()
            raise ApiError(400, str(error)) from None
        service.metrics.loads.labels("loaded").inc()
        return unused

    async def unload(name: str) -> None:
        try:
            async with changing:
                await asyncio.to_thread(service.engine.unload, name)
                if service.state is not None:
                    await asyncio.to_thread(service.state.forget, name)
        except ValueError as error:
            raise ApiError(404, str(error), code="model_not_found") from None
        service.metrics.forget(name)

    @app.get("/v1/adapters", **documented())
    async def listed() -> Any:
        there = set(service.bank.resident())
        return {"adapters": [{"name": name, "resident": name in there} for name in service.bank.names()]}

    @app.post("/v1/adapters", status_code=201, **documented(400, body=AdapterBody))
    async def load_ours(request: Request) -> Any:
        body = await read_body(request, AdapterBody, service.strict)
        unused = await load(body.name, body.folder, body.pin)
        return {"name": body.name} | ({} if unused is None else {"note": unused})

    @app.delete("/v1/adapters/{name}", status_code=204, response_class=Response, **documented(404))
    async def unload_ours(name: str) -> Response:
        await unload(name)
        return Response(status_code=204)

    @app.post("/v1/load_lora_adapter", response_class=PlainTextResponse, **documented(400, body=LoadLoRABody))
    async def load_as_vllm(request: Request) -> str:
        body = await read_body(request, LoadLoRABody, service.strict)
        if body.lora_name in service.bank.names() and not body.load_inplace:
            raise ApiError(
                400, f"the adapter {body.lora_name!r} is loaded; load_inplace replaces it", param="lora_name"
            )
        await load(body.lora_name, body.lora_path)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, **documented(400, 404, body=UnloadLoRABody))
    async def unload_as_vllm(request: Request) -> str:
        body = await read_body(request, UnloadLoRABody, service.strict)
        await unload(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


# ------------------------------------------------------------------------------------------------------------- tokens


def add_token_routes(app: FastAPI, service: Service) -> None:
    """Tokens of texts and back, as vLLM has them."""

    @app.post("/tokenize", **documented(400, 404, body=TokenizeBody))
    async def tokenize(request: Request) -> Any:
        body = await read_body(request, TokenizeBody, service.strict)
        service.adapter(body.model)
        if body.messages is not None:
            make = partial(
                service.render,
                body.model,
                body.messages,
                body.tools,
                add_generation_prompt=body.add_generation_prompt,
                settings=body.chat_template_kwargs,
            )
        else:
            make = partial(service.tokens, body.prompt or "", body.add_special_tokens)
        tokens = await service.read(make)
        spelt = service.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": service.engine.max_length,
            "tokens": tokens,
            "token_strs": spelt,
        }

    @app.post("/detokenize", **documented(400, 404, body=DetokenizeBody))
    async def detokenize(request: Request) -> Any:
        body = await read_body(request, DetokenizeBody, service.strict)
        service.adapter(body.model)
        if max(body.tokens, default=0) >= service.engine.vocabulary:
            raise ApiError(400, f"expected token ids from 0 to {service.engine.vocabulary - 1}", param="tokens")
        return {"prompt": await service.read(service.text, body.tokens)}


# ------------------------------------------------------------------------------------------------------------- health


def add_health_routes(app: FastAPI, service: Service) -> None:
    """Whether the server answers, what it has done, and the page."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    async def health() -> Any:
        if not service.engine.alive:
            raise ApiError(503, "the server is shutting down")
        return {"status": "ok"}

    for path in ("/health", "/ping"):
        app.get(path, name=path.strip("/"), **documented(503))(health)
    app.post("/ping", name="ping_post", **documented(503))(health)

    @app.get("/version", **documented())
    async def told() -> Any:
        try:
            return {"version": version("lowrank_kernels")}
        except PackageNotFoundError:
            return {"version": "unknown"}

    @app.get("/load", **documented())
    async def load() -> Any:
        return {"server_load": service.open_requests}

    @app.get("/metrics", response_class=PlainTextResponse, **documented())
    async def measured() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, **documented())
    async def web_page() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
