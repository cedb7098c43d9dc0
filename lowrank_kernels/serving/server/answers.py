"""Answers in OpenAI's form: whole, or chunk by chunk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from ..engine import Completion, Delta, TokenLogprob
from .bodies import Sampling
from .tools import Plain


class Answer:
    """What every answer to one request has in common.

    Args:
        body: of the request.
        model: the name that the answer gives.
        prompts: tokens of each prompt; ``body.n`` rows follow from each, one after another.
        tokenizer: of the model.
    """

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, body: Sampling, model: str, prompts: Sequence[list[int]], tokenizer: Any) -> None:
        self.body: Any = body  # with what its kind alone has
        self.prompts = prompts
        self.generated = 0
        self._same = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._spelling: Callable[[int], str] = lru_cache(1 << 16)(lambda token: tokenizer.decode([token]))

    def whole(self, found: Sequence[Completion]) -> dict[str, Any]:
        """The answer with all that the rows said."""
        self.generated = sum(len(one.tokens) for one in found)
        choices = [self.choice(row, one) for row, one in enumerate(found)]
        return {"object": self.kind, **self._same, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of what was generated so far."""
        prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.generated,
            "total_tokens": prompt + self.generated,
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """Chunks that come before all others."""
        yield from ()

    def chunks(self, row: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks of what a row has said."""
        self.generated += len(delta.tokens)
        yield from (self.chunk([choice]) for choice in self.parts(row, delta))

    def last(self) -> dict[str, Any]:
        """The chunk that has no choices, and the usage."""
        return self.chunk([]) | {"usage": self.usage()}

    def chunk(self, choices: list[Any]) -> dict[str, Any]:
        """One chunk; with a usage to come, each says that it is not there yet."""
        usage = {"usage": None} if self.body.usage_at_end else {}
        return {"object": self.chunk_kind, **self._same, "choices": choices, **usage}

    def choice(self, row: int, found: Completion) -> dict[str, Any]:
        """One row's choice of a whole answer."""
        raise NotImplementedError

    def parts(self, row: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The choices that tell what a row has said."""
        raise NotImplementedError


class TextAnswer(Answer):
    """An answer of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, body: Any, model: str, prompts: Sequence[list[int]], texts: list[str], tokenizer: Any) -> None:
        super().__init__(body, model, prompts, tokenizer)
        self.texts = texts if body.echo else [""] * len(prompts)
        self._offsets: dict[int, int] = {}  # of the next token in its row's text

    def choice(self, row: int, found: Completion) -> dict[str, Any]:
        text, tokens = self.texts[row // self.body.n], list(found.logprobs)
        if self.body.echo:
            tokens = list(found.prompt_logprobs) + tokens
        return self._choice(row, text + found.text, tokens, found.finish_reason, found.stop_reason)

    def parts(self, row: int, delta: Delta) -> Iterator[dict[str, Any]]:
        text = "" if row in self._offsets else self.texts[row // self.body.n]
        yield self._choice(row, text + delta.text, delta.logprobs, delta.finish_reason, None)
        self._offsets.setdefault(row, 0)

    def _choice(self, row: int, text: str, tokens: Sequence[TokenLogprob], reason: Any, stop: Any) -> dict[str, Any]:
        logprobs = None if self.body.logprobs is None else self._logprobs(row, tokens)
        choice = {"index": row, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice | ({} if stop is None else {"stop_reason": stop})

    def _logprobs(self, row: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        spelt, offsets, at = [], [], self._offsets.get(row, 0)
        for one in tokens:
            spelt.append(self._spelling(one.token))
            offsets.append(at)
            at += len(spelt[-1])
        self._offsets[row] = at
        tops = [None if one.logprob is None else self._top(one) for one in tokens]
        return {
            "tokens": spelt,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": tops if self.body.logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the one that came."""
        top = {self._spelling(token): logprob for token, logprob in one.top}
        return top if one.logprob is None else top | {self._spelling(one.token): one.logprob}


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions.

    Args:
        reader: makes what tells calls from text, for each row.
    """

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, body: Any, model: str, prompt: list[int], reader: Callable[[], Plain], tokenizer: Any) -> None:
        super().__init__(body, model, [prompt], tokenizer)
        self._reader = reader
        self._readers = [reader() for _ in range(body.n)]

    def choice(self, row: int, found: Completion) -> dict[str, Any]:
        reader = self._reader()
        text = reader.feed(found.text)
        more, calls = reader.end()
        message: dict[str, Any] = {"role": "assistant", "content": text + more}
        if calls:
            message |= {"content": (text + more).strip() or None, "tool_calls": calls}
        return self._choice(row, {"message": message}, found.logprobs, found, bool(calls)) | (
            {} if found.stop_reason is None else {"stop_reason": found.stop_reason}
        )

    def begin(self) -> Iterator[dict[str, Any]]:
        for row in range(self.body.n):
            said = {"role": "assistant", "content": ""}
            yield self.chunk([{"index": row, "delta": said, "logprobs": None, "finish_reason": None}])

    def parts(self, row: int, delta: Delta) -> Iterator[dict[str, Any]]:
        reader = self._readers[row]
        text = reader.feed(delta.text)
        calls: list[dict[str, Any]] = []
        if delta.finish_reason is not None:
            more, calls = reader.end()
            text += more
        said: dict[str, Any] = {"content": text} if text else {}
        if calls:
            said["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        if said or delta.finish_reason is not None or (delta.logprobs and self.body.logprobs):
            yield self._choice(row, {"delta": said}, delta.logprobs, delta, bool(calls))

    def _choice(
        self, row: int, said: dict[str, Any], tokens: Sequence[TokenLogprob], of: Completion | Delta, calls: bool
    ) -> dict[str, Any]:
        logprobs = {"content": [self._logprob(one) for one in tokens], "refusal": None} if self.body.logprobs else None
        reason = "tool_calls" if calls else of.finish_reason
        return {"index": row, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [self._said(token, logprob) for token, logprob in one.top[: self.body.top_logprobs]]
        return self._said(one.token, one.logprob) | {"top_logprobs": top}

    def _said(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._spelling(token)
        # A token that is no text by itself, a part of a character, has no bytes that the tokenizer tells of.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": [*text.encode()] if whole else None}
