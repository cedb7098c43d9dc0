"""What the endpoints share: the engine that answers, its adapters, prompts as tokens, and what is counted."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from ..engine import Closed, Completion, Delta, Engine, Generation, QueueFull
from .bodies import Message, Tool
from .errors import ApiError
from .metrics import Metrics
from .state import State

KEEP_ALIVE_SECONDS = 15.0
"""After which a stream in which nothing has come says that it is still there."""

Result = TypeVar("Result")


class Service:
    """An engine behind HTTP.

    Attributes:
        engine: answers; its ``bank`` holds the adapters and its ``tokenizer`` reads prompts.
        model_name: the base's, which no adapter may have.
        adapters: the folder below which adapters are found.
        strict: refuse fields that are not known.
        state: where the adapters that are loaded and unloaded are noted; None for nowhere.
        started: when, in seconds since the epoch.
        open_requests: that are being answered.
    """

    def __init__(
        self, engine: Engine, model_name: str, adapters: Path, *, strict: bool = False, state: State | None = None
    ) -> None:
        self.engine, self.model_name, self.adapters, self.strict = engine, model_name, adapters, strict
        self.bank, self.tokenizer, self.state = engine.bank, engine.tokenizer, state
        self.metrics = Metrics(self._now)
        self.started, self.open_requests = int(time.time()), 0
        # One thread: a tokenizer is not made for several. What waits for it does not stop the event loop.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        # What a client may not set for a template, since it changes what comes back.
        self._own_settings = frozenset(inspect.signature(self.tokenizer.apply_chat_template).parameters)
        longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        self.most_characters = engine.max_length * longest

    def close(self) -> None:
        """End the engine when what it has is done, and the tokenizer's thread."""
        self.engine.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------------------------- prompts and adapters

    async def read(self, function: Callable[..., Result], *args: Any) -> Result:
        """``function(*args)`` on the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, function, *args)

    def check_length(self, text: str) -> None:
        """Raise ApiError for a text that no tokens within the limit can be, before any work on it."""
        if len(text) > self.most_characters:
            raise ApiError(
                400,
                f"expected a prompt of at most {self.most_characters} characters, got {len(text)}; "
                f"{self.engine.max_length} tokens hold no more",
                code="context_length_exceeded",
            )

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, with the tokenizer's special ones unless ``special`` is False."""
        self.check_length(text)
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(tokens))

    def render(
        self,
        model: str | None,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        add_generation_prompt: bool = True,
        settings: dict[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of messages, through the chat template of the adapter or else of the model.

        Raises:
            ApiError: 400, no template, or one that refuses the messages.
        """
        template = self.template(model)
        if template is None:
            raise ApiError(400, "the model has no chat template; use /v1/completions", param="messages")
        for message in messages:
            self.check_length(message.content)
        try:
            text = self.tokenizer.apply_chat_template(
                [message.for_template() for message in messages],
                tools=[tool.model_dump() for tool in tools] or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{key: value for key, value in (settings or {}).items() if key not in self._own_settings},
            )
        except Exception as error:  # a template raises what it likes, for roles in an order that it does not take
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return self.tokens(text, special=False)  # the template writes them

    def template(self, model: str | None) -> str | None:
        """The chat template for the model of that name."""
        return self.engine.chat_templates.get(model or self.model_name, self.tokenizer.chat_template)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model's name means; None for the base.

        Raises:
            ApiError: 404.
        """
        if model is None or model == self.model_name:
            return None
        if model not in self.bank.names():
            raise ApiError(
                404,
                f"there is no model {model!r}; GET /v1/models names those that are",
                param="model",
                code="model_not_found",
            )
        return model

    # ------------------------------------------------------------------------------------------------------ answering

    def submit(self, jobs: Sequence[Generation]) -> None:
        """Queue these rows.

        Raises:
            ApiError: 400, rows that cannot be served; 429, a full queue; 503, the server is shutting down.
        """
        try:
            self.engine.submit(jobs)
        except QueueFull as error:
            raise ApiError(429, str(error), code="rate_limit_exceeded") from None
        except Closed as error:
            raise ApiError(503, str(error)) from None
        except ValueError as error:
            long = max(len(job.prompt) for job in jobs) >= self.engine.max_length
            raise ApiError(400, str(error), code="context_length_exceeded" if long else None) from None

    async def complete(self, request: Request, jobs: Sequence[Generation]) -> list[Completion]:
        """The completion of each row; all are cancelled when the client goes.

        Raises:
            ApiError: of ``submit``; 404, the adapter was unloaded; 499, the client is gone; 500, the row failed; 503,
                the server is shutting down.
        """
        self.submit(jobs)
        waiting = [asyncio.wrap_future(job.future) for job in jobs]
        gone: asyncio.Future[Any] = asyncio.ensure_future(disconnected(request.receive))
        self.open_requests += 1
        try:
            every: asyncio.Future[Any] = asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.wait([every, gone], return_when=asyncio.FIRST_COMPLETED)
            if not every.done():
                raise ApiError(499, "the client is gone")
            return [self.ended(job, of_row) for job, of_row in zip(jobs, every.result(), strict=True)]
        finally:
            self.open_requests -= 1
            gone.cancel()
            self.cancel(jobs)

    def stream(self, jobs: Sequence[Generation]) -> RowEvents:
        """Queue these rows and follow what they say.

        Raises:
            ApiError: of ``submit``.
        """
        events = RowEvents(self, jobs)
        self.submit(jobs)
        return events

    def cancel(self, jobs: Iterable[Generation]) -> None:
        """End rows that still wait or run."""
        for job in jobs:
            if job.future.cancel():
                self.metrics.cancelled.inc()

    def ended(self, job: Generation, result: Any) -> Completion:
        """The completion of a row that has ended, counted; or what to answer instead, raised."""
        if isinstance(result, Completion):
            model = job.adapter or self.model_name
            self.metrics.row(model, len(job.prompt), len(result.tokens), result.times)
            return result
        if isinstance(result, asyncio.CancelledError):
            raise ApiError(503, "the server is shutting down")
        self.adapter(job.adapter)
        raise ApiError(500, f"the row failed: {result}")

    # -------------------------------------------------------------------------------------------------------- metrics

    def _now(self) -> Iterable[tuple[str, str, float, bool]]:
        engine, bank = self.engine, self.bank
        yield "lrk_waiting_rows", "Rows that wait.", engine.waiting, False
        yield "lrk_running_rows", "Rows that run.", engine.running, False
        yield "lrk_adapters", "Adapters.", len(bank.names()), False
        yield "lrk_adapters_resident", "Adapters on the device.", len(bank.resident()), False
        yield "lrk_adapter_bytes", "Bytes of adapters on the device.", bank.nbytes, False
        for name, count in dict(engine.counts).items():
            yield f"lrk_engine_{name}", f"The engine's {name.replace('_', ' ')}.", count, True


class RowEvents:
    """What rows say as they say it, from the engine's thread to the event loop's."""

    def __init__(self, service: Service, jobs: Sequence[Generation]) -> None:
        self._service, self._jobs = service, jobs
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(row: int, said: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._queue.put_nowait, (row, said))

        for row, job in enumerate(jobs):
            job.on_delta = partial(put, row)
            job.future.add_done_callback(partial(put, row))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta] | None]:
        """(row, what it said); None when nothing has come for ``KEEP_ALIVE_SECONDS``.

        Raises:
            ApiError: a row failed.
        """
        # A row has ended when its last piece and its completion have come, in whatever order.
        left = 2 * len(self._jobs)
        while left:
            try:
                row, said = await asyncio.wait_for(self._queue.get(), KEEP_ALIVE_SECONDS)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(said, Future):
                self._service.ended(self._jobs[row], _outcome(said))
                left -= 1
            else:
                left -= said.finish_reason is not None
                yield row, said

    def close(self) -> None:
        """End the rows that still wait or run."""
        self._service.cancel(self._jobs)


def _outcome(future: Future[Completion]) -> Completion | BaseException:
    if future.cancelled():
        return asyncio.CancelledError()
    return future.exception() or future.result()


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
