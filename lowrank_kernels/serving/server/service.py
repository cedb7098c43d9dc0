"""What the endpoints share: the model that answers, its adapters, and what is counted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fastapi import Request
from starlette.exceptions import HTTPException

from ..batcher import Batcher, Closed, Completion, Generation, QueueFull
from .bodies import Sampling
from .metrics import Metrics


class Service:
    """A batcher behind HTTP.

    Attributes:
        batcher: answers; its ``bank`` holds the adapters and its ``tokenizer`` reads prompts.
        model_name: the base's, which no adapter may have.
        adapters: the folder below which adapters are found.
        started: when, in seconds since the epoch.
    """

    def __init__(self, batcher: Batcher, model_name: str, adapters: Path) -> None:
        self.batcher, self.model_name, self.adapters = batcher, model_name, adapters
        self.bank, self.tokenizer = batcher.bank, batcher.tokenizer
        self.metrics = Metrics()
        self.started = int(time.time())
        self._encoding = threading.Lock()  # a tokenizer is not made for several threads

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text, with the tokenizer's special ones unless ``special`` is False."""
        with self._encoding:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    async def complete(
        self, request: Request, body: Sampling, prompts: Sequence[list[int]], most: int
    ) -> list[Completion]:
        """A completion of at most ``most`` tokens for each prompt; cancelled when the client goes.

        Raises:
            HTTPException: 404, no such model; 422, a request that cannot be served; 429, a full queue; 499, the client
                is gone; 503, the server is shutting down.
        """
        adapter = None if body.model == self.model_name else body.model
        if adapter is not None and adapter not in self.bank.names():
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
            self.batcher.submit(jobs)
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
                    self.metrics.add("lrk_cancelled_total", len(jobs))
                    raise HTTPException(499, "the client is gone")
            found = [future.result() for future in waiting]
        except asyncio.CancelledError:  # a row's, or this request's own when time is up
            raise HTTPException(503, "the server is shutting down") from None
        except ValueError as error:
            gone = adapter is not None and adapter not in self.bank.names()
            raise HTTPException(404 if gone else 503, str(error)) from None
        finally:
            for future in waiting:
                future.cancel()
                if future.done() and not future.cancelled():
                    future.exception()  # asyncio logs one that nobody has asked for
        self.metrics.add("lrk_prompt_tokens_total", sum(len(prompt) for prompt in prompts))
        self.metrics.add("lrk_generated_tokens_total", sum(len(one.tokens) for one in found))
        return found
