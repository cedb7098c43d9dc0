"""The HTTP server over a :class:`Batcher`: OpenAI's completions, chat and models; adapters come and go; metrics."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from ..adapters.folder import CONFIG_FILE
from .batcher import Batcher, Closed, Completion, Generation, QueueFull

_MAX_CHOICES = 64
_MAX_STOP = 4


class _Body(BaseModel):
    """What a request may say; anything else is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


# Settings that clients send with the value that asks for nothing; null asks for nothing too.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "stream_options": (),
    "store": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
# What an answer of this server, or of OpenAI's, carries beside its text when it is sent back.
_OF_AN_ANSWER = ("refusal", "tool_calls", "function_call", "audio", "annotations", "name", "reasoning_content")


def _without_neutral(given: Any) -> Any:
    if not isinstance(given, dict):
        return given

    def says_nothing(key: str, value: Any) -> bool:
        return value is None or any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in _NEUTRAL.get(key, ())
        )

    return {key: value for key, value in given.items() if not says_nothing(key, value)}


class _Sampling(_Body):
    model: str
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=_MAX_STOP)]
        | None
    ) = None
    n: Literal[1] = 1
    stream: Literal[False] = False
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, given: Any) -> Any:
        return _without_neutral(given)

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_Tokens = Annotated[list[int], Field(min_length=1)]


class CompletionBody(_Sampling):
    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_CHOICES)]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=_MAX_CHOICES)]
    )


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """``content`` may be parts that are texts, which are put together; a developer is the system."""

    role: Literal["system", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {key: value for key, value in given.items() if key not in _OF_AN_ANSWER or value not in (None, [], "")}
        if isinstance(said.get("content"), list):
            said["content"] = "".join(TextPart.model_validate(part).text for part in said["content"])
        return said | ({"role": "system"} if said.get("role") == "developer" else {})


class ChatBody(_Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class AdapterBody(_Body):
    name: str = Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")
    folder: str = Field(min_length=1, max_length=512)
    pin: bool = False


class Metrics:
    """Counters by name and labels, as Prometheus reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, float]] = {}

    def add(self, name: str, value: float = 1, **labels: object) -> None:
        key = ",".join(f'{label}="{text}"' for label, text in labels.items())
        with self._lock:
            of_name = self._counts.setdefault(name, {})
            of_name[key] = of_name.get(key, 0) + value

    def text(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> str:
        with self._lock:
            every: dict[str, tuple[str, dict[str, float]]]
        every = {name: ("counter", dict(values)) for name, values in self._counts.items()}
        every |= {name: ("counter", {"": value}) for name, value in counters.items()}
        every |= {name: ("gauge", {"": value}) for name, value in gauges.items()}
        lines = []
        for name, (kind, values) in every.items():
            lines.append(f"# TYPE {name} {kind}")
            lines += [
                f"{name}{{{key}}} {value:.10g}" if key else f"{name} {value:.10g}" for key, value in values.items()
            ]
        return "\n".join(lines) + "\n"


class _Counted:
    """ASGI: counts requests of the API by status, and their time."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        start = time.perf_counter()

        async def seen(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.add("lrk_requests_total", status=message["status"])
                self.metrics.add("lrk_request_seconds_total", time.perf_counter() - start)
            await send(message)

        return await self.app(scope, receive, seen)


class _BodyLimit:
    """ASGI: refuses a body of more than ``limit`` bytes with 413, said beforehand or counted as it comes."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self.limit:
            return await self._refuse(scope, receive, send)
        # The body is read here, whole: what follows sees one that is within the limit.
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
        await _error(413, f"expected a body of at most {self.limit} bytes")(scope, receive, send)


def _error(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def adapter_folder(root: Path, folder: str) -> Path:
    """The folder of that name below ``root``.

    Raises:
        ValueError: there is none, or it lies elsewhere (absolute, "..", a link that leads out).
    """
    try:
        top = root.resolve(strict=True)
        found = (top / folder).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        found = None
    if found is None or found == top or not found.is_relative_to(top) or not found.is_dir():
        raise ValueError(f"expected the name of a folder below the folder of adapters, got {folder!r}")
    return found


def load_all(batcher: Batcher, root: Path, model_name: str) -> dict[str, str]:
    """Load each adapter in a folder of ``root`` under that folder's name; why others could not be, by name.

    Where ``root`` is itself an adapter's folder, that one is loaded, under its name.
    """
    failed = {}
    own = (root / CONFIG_FILE).is_file()
    for folder in [root.resolve()] if own else sorted(p for p in root.iterdir() if (p / CONFIG_FILE).is_file()):
        try:
            if folder.name == model_name:
                raise ValueError("that is the name of the base model")
            batcher.load(folder.name, folder if own else adapter_folder(root, folder.name))
        except Exception as error:
            failed[folder.name] = str(error)
    return failed


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
    bank, tokenizer, metrics = batcher.bank, batcher.tokenizer, Metrics()
    started = int(time.time())
    encoding = threading.Lock()  # a tokenizer is not made for several threads

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="lowrank_kernels", lifespan=lifespan, docs_url=None, redoc_url=None)

    app.add_middleware(_BodyLimit, limit=max_body_bytes)
    app.add_middleware(_Counted, metrics=metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        said = {f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors()}
        return _error(422, "; ".join(sorted(said)))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _error(500, f"{type(error).__name__} in the server")  # the log has the rest

    def encode(text: str, special: bool = True) -> list[int]:
        with encoding:
            return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    async def complete(request: Request, body: _Sampling, prompts: Sequence[list[int]], most: int) -> list[Completion]:
        """A completion for each prompt; cancelled when the client goes."""
        adapter = None if body.model == model_name else body.model
        if adapter is not None and adapter not in bank.names():
            raise HTTPException(404, f"there is no model {body.model!r}; GET /v1/models names those that are")
        jobs = [
            Generation(
                adapter,
                prompt,
                most,
                body.stops(),
                body.temperature,
                body.top_p,
                None if body.seed is None else (body.seed + i) % 2**63,
            )
            for i, prompt in enumerate(prompts)
        ]
        try:
            batcher.submit(jobs)
        except QueueFull as error:
            raise HTTPException(429, str(error)) from None
        except Closed as error:
            raise HTTPException(503, str(error)) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        waiting = [asyncio.wrap_future(job.future) for job in jobs]
        try:
            while (await asyncio.wait(waiting, timeout=0.25))[1]:
                if await request.is_disconnected():
                    metrics.add("lrk_cancelled_total", len(jobs))
                    raise HTTPException(499, "the client is gone")
            found = [future.result() for future in waiting]
        except asyncio.CancelledError:  # a row's, or this request's own when time is up
            raise HTTPException(503, "the server is shutting down") from None
        except ValueError as error:
            gone = adapter is not None and adapter not in bank.names()
            raise HTTPException(404 if gone else 503, str(error)) from None
        finally:
            for future in waiting:
                future.cancel()
                if future.done() and not future.cancelled():
                    future.exception()  # seen
        metrics.add("lrk_prompt_tokens_total", sum(len(prompt) for prompt in prompts))
        metrics.add("lrk_generated_tokens_total", sum(len(one.tokens) for one in found))
        return found

    def answer(kind: str, body: _Sampling, prompts: Sequence[list[int]], found: list[Completion], choices: Any) -> Any:
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

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Any:
        given: Any = body.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        prompts = [
            await asyncio.to_thread(encode, one) if isinstance(one, str) else one
            for one in (given if several else [given])
        ]
        found = await complete(request, body, prompts, body.max_tokens)
        choices = [
            {"index": i, "text": one.text, "finish_reason": one.finish_reason, "logprobs": None}
            for i, one in enumerate(found)
        ]
        return answer("text_completion", body, prompts, found, choices)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Any:
        template = batcher.chat_templates.get(body.model, tokenizer.chat_template)
        if template is None:
            raise HTTPException(422, "the model has no chat template; use /v1/completions")

        def render() -> list[int]:
            messages = [message.model_dump() for message in body.messages]
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            return encode(text, special=False)  # the template writes them

        try:
            prompt = await asyncio.to_thread(render)
        except Exception as error:  # a template raises what it likes, for roles in an order that it does not take
            raise HTTPException(422, f"the model's chat template refuses these messages: {error}") from None
        found = await complete(request, body, [prompt], body.max_completion_tokens or body.max_tokens)
        choices = [
            {
                "index": 0,
                "message": {"role": "assistant", "content": one.text},
                "finish_reason": one.finish_reason,
                "logprobs": None,
            }
            for one in found
        ]
        return answer("chat.completion", body, [prompt], found, choices)

    @app.get("/v1/models")
    async def models() -> Any:
        def one(name: str, parent: str | None) -> dict[str, Any]:
            return {"id": name, "object": "model", "created": started, "owned_by": "lowrank_kernels", "parent": parent}

        return {"object": "list", "data": [one(model_name, None), *(one(name, model_name) for name in bank.names())]}

    @app.get("/v1/adapters")
    async def listed() -> Any:
        there = set(bank.resident())
        return {"adapters": [{"name": name, "resident": name in there} for name in bank.names()]}

    @app.post("/v1/adapters", status_code=201)
    async def load(body: AdapterBody) -> Any:
        if body.name == model_name:
            raise HTTPException(422, f"{body.name!r} is the name of the base model")
        try:
            folder = adapter_folder(adapters, body.folder)
            try:
                unused = await asyncio.to_thread(batcher.load, body.name, folder, pin=body.pin)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(str(error).replace(str(folder), body.folder)) from None
        except ValueError as error:
            metrics.add("lrk_adapter_loads_total", result="refused")
            raise HTTPException(422, str(error)) from None
        metrics.add("lrk_adapter_loads_total", result="loaded")
        return {"name": body.name} | ({} if unused is None else {"note": unused})

    @app.delete("/v1/adapters/{name}", status_code=204, response_class=Response)
    async def unload(name: str) -> None:
        try:
            bank.unload(name)
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        batcher.chat_templates.pop(name, None)

    @app.get("/health")
    async def health() -> Any:
        if not batcher.alive:
            return _error(503, "the server is shutting down")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def measured() -> str:
        gauges = {
            "lrk_waiting_rows": batcher.waiting,
            "lrk_running_rows": batcher.running,
            "lrk_adapters": len(bank.names()),
            "lrk_adapters_resident": len(bank.resident()),
            "lrk_adapter_bytes": bank.nbytes,
        }
        return metrics.text(gauges, {"lrk_batches_total": batcher.batches, "lrk_batch_rows_total": batcher.rows})

    return app
