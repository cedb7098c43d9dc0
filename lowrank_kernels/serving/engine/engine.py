"""``Engine``: generations of different adapters, which join and leave a running batch at every token."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank import AdapterBank, Held, NoRoom
from ..conversation import chat_template, unused_tokenizer
from .attention import PackedModel, RowCache, Span
from .generation import Closed, Completion, Delta, Generation, QueueFull, Times, TokenLogprob
from .queue import FairQueue
from .sampling import Sampler, next_tokens, token_logprobs
from .text import TextStream

_log = logging.getLogger(__name__)
_WORTH_REUSING = 8  # tokens of a common beginning
_USUAL_LENGTH = 1024  # tokens of a row, for which the default cache has room


class _Row:
    """A generation that has been admitted: its tokens, and the keys and values of those that the model has seen."""

    def __init__(self, job: Generation, held: Held, arrival: int, engine: Engine) -> None:
        self.job, self.held, self.arrival = job, held, arrival
        self.tokens = list(job.prompt)
        most = engine.max_length - len(job.prompt)
        self.most = most if job.max_tokens is None else min(most, job.max_tokens)
        self.ends = frozenset() if job.ignore_eos else engine.ends
        special = set(getattr(engine.tokenizer, "all_special_tokens", ()))
        texts = {engine.tokenizer.convert_tokens_to_ids(s): s for s in job.stop if s in special}
        self.stops: dict[int, str | int] = {**{token: token for token in job.stop_token_ids}, **texts}
        self.sampler = Sampler(job, {*self.ends, *job.stop_token_ids})
        self.text = TextStream(engine.tokenizer, job.stop, job.include_stop)
        self.cache: RowCache | None = None
        self.source: tuple[RowCache, int] | None = None  # whose first tokens are its own, once they are there
        self.generated: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.told, self.piece = 0, ""  # tokens, and text, of earlier and of the next delta
        self.started, self.first = time.monotonic(), 0.0

    @property
    def rank(self) -> tuple[int, int]:
        """What runs rather is smaller."""
        return self.job.priority, self.arrival

    @property
    def missing(self) -> int:
        """Tokens that the model has yet to see."""
        return len(self.tokens) - (0 if self.cache is None else self.cache.length)

    @property
    def notes_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told; it has then generated nothing."""
        return self.job.prompt_logprobs and len(self.prompt_logprobs) < len(self.job.prompt)

    def logits_of(self, count: int) -> int:
        """Of how many of its next ``count`` tokens, the last ones, the logits are needed."""
        return count if self.notes_prompt else int(count == self.missing)


class _Parked:
    """Keys and values that an ended row left, for one that begins alike."""

    def __init__(self, content_hash: str, tokens: list[int], cache: RowCache) -> None:
        self.content_hash, self.tokens, self.cache = content_hash, tokens, cache


class Engine:
    """Generates for many rows at once, each with its own adapter of a bank; rows join and leave at every token.

    Each step runs one forward over the next token of every row, and over up to ``chunk_tokens`` tokens of prompts,
    packed without padding. Rows keep their keys and values; a row that begins as another with the same adapter content
    takes those over. When ``cache_tokens`` run out, the row that came last is paused and computed again later.

    What a row's tokens are does not depend on the others: the kernels of this package give the same bits for a row in
    any batch, attention runs row by row, draws are the row's own. The library's products of the frozen weights may
    round differently for another number of rows, in float32 at odd widths above all.

    Args:
        bank: of the adapters; its model generates.
        tokenizer: of the model, for stop texts and text.
        max_rows: that run together.
        chunk_tokens: of prompts in a step, so that running rows do not wait long for a new one's prompt.
        max_queue: generations that may wait.
        max_length: tokens of a prompt and its completion; default: the positions that the model has.
        cache_tokens: whose keys and values are kept, of all rows; default: ``max_rows`` times 1024, or ``max_length``
            where that is more.
        background: run steps on a thread of the engine's own; else call ``step``.

    Raises:
        ValueError: a limit below 1, a ``max_length`` beyond what the model has, ``cache_tokens`` for less than one row,
            a model whose attention cannot be packed (see :class:`PackedModel`).
    """

    def __init__(
        self,
        bank: AdapterBank,
        tokenizer: Any,
        *,
        max_rows: int = 16,
        chunk_tokens: int = 128,
        max_queue: int = 256,
        max_length: int | None = None,
        cache_tokens: int | None = None,
        background: bool = True,
    ) -> None:
        model: Any = bank.model
        text_config = model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        max_length = max_length if max_length is not None else positions or 2048
        if cache_tokens is None:
            cache_tokens = max(max_length, max_rows * _USUAL_LENGTH)
        limits = {"max_rows": max_rows, "chunk_tokens": chunk_tokens, "max_queue": max_queue, "max_length": max_length}
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"Engine: expected {name} to be at least 1, got {value}")
        if positions is not None and max_length > positions:
            raise ValueError(f"Engine: expected max_length to be at most the model's {positions}, got {max_length}")
        if cache_tokens < max_length:
            raise ValueError(
                f"Engine: expected cache_tokens for one row of max_length={max_length} at least, got {cache_tokens}"
            )
        self.bank, self.tokenizer = bank, tokenizer
        self.chat_templates: dict[str, str] = {}  # of adapters that have one of their own
        self.max_rows, self.chunk_tokens, self.max_queue = max_rows, chunk_tokens, max_queue
        self.max_length, self.cache_tokens = max_length, cache_tokens
        self.vocabulary = int(text_config.vocab_size)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.ends = frozenset([*ends, *own])
        self.counts = dict.fromkeys(
            ("steps", "step_rows", "prompt_tokens", "cached_prompt_tokens", "generated_tokens", "preemptions"), 0
        )
        self.failed: BaseException | None = None  # why the engine's thread has ended
        self.on_failure: Callable[[BaseException], None] | None = None
        self._model = PackedModel(model)
        self._queue = FairQueue()
        self._rows: list[_Row] = []
        self._paused: list[_Row] = []
        self._parked: list[_Parked] = []  # the least recently left first
        self._arrivals = itertools.count()
        self._batch: tuple[Any, ExitStack] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True) if background else None
        if self._thread is not None:
            self._thread.start()

    # ------------------------------------------------------------------------------------------- from any thread

    def load(self, name: str, folder: Path, *, pin: bool = False) -> str | None:
        """Serve an adapter's folder as ``name``, with the chat template in it, if there is one.

        Returns:
            What of the folder is not used, in words, which the log has too; None for nothing.

        Raises:
            ValueError, TypeError: as ``AdapterBank.load``; a template or tokenizer that cannot be read.
        """
        template, unused = chat_template(folder), unused_tokenizer(folder, self.tokenizer)
        self.bank.load(name, folder, pin=pin)
        self.chat_templates.pop(name, None)
        if template is not None:
            self.chat_templates[name] = template
        if unused is not None:
            _log.warning("adapter %s: %s", name, unused)
        return unused

    def unload(self, name: str) -> None:
        """Forget an adapter. Rows that run with it go on; those that wait for it fail.

        Raises:
            ValueError: there is none of that name.
        """
        self.bank.unload(name)
        self.chat_templates.pop(name, None)
        with self._changed:
            self._queue.forget(name)

    def submit(self, jobs: Sequence[Generation]) -> None:
        """Queue all of these, or none.

        Raises:
            ValueError: an empty prompt, a token id out of range, more than ``max_length``, a setting out of its range.
            QueueFull: no room for all of them.
            Closed: after ``close``, or when the engine has failed.
        """
        for job in jobs:
            self._check(job)
        now = time.monotonic()
        with self._changed:
            if self._closed or self.failed is not None:
                raise Closed("the server is shutting down")
            if len(self._queue) + len(jobs) > self.max_queue:
                raise QueueFull(f"{len(self._queue)} of {self.max_queue} places of the queue are taken")
            for job in jobs:
                job.submitted = now
                self._queue.add(job)
            self._changed.notify()

    def _check(self, job: Generation) -> None:
        least = 1 if job.max_tokens is None else job.max_tokens
        if not job.prompt or least < 1:
            raise ValueError("expected a prompt of at least one token, and max_tokens of at least 1")
        if len(job.prompt) + least > self.max_length:
            raise ValueError(
                f"expected prompt and completion within {self.max_length} tokens, got {len(job.prompt)} and "
                f"max_tokens={job.max_tokens}; shorten the prompt or lower max_tokens"
            )
        for what, ids in (("token ids", job.prompt), ("ids of logit_bias", job.logit_bias)):
            if ids and (min(ids) < 0 or max(ids) >= self.vocabulary):
                raise ValueError(f"expected {what} from 0 to {self.vocabulary - 1}, got {list(ids)[:8]}")
        penalties = job.presence_penalty, job.frequency_penalty
        numbers = (job.temperature, job.top_p, job.min_p, job.repetition_penalty, *penalties, *job.logit_bias.values())
        if not all(map(math.isfinite, numbers)):
            raise ValueError("expected finite settings of the sampler")
        ranges = {
            "temperature": job.temperature >= 0,
            "top_p": 0 < job.top_p <= 1,
            "top_k": job.top_k >= 0,
            "min_p": 0 <= job.min_p <= 1,
            "repetition_penalty": job.repetition_penalty > 0,
            "logprobs": job.logprobs is None or 0 <= job.logprobs <= self.vocabulary,
        }
        for name, holds in ranges.items():
            if not holds:
                raise ValueError(f"{name} is out of range, got {getattr(job, name)}")

    def _jobs(self) -> list[Generation]:
        return [*self._queue, *(row.job for row in (*self._rows, *self._paused))]

    @property
    def waiting(self) -> int:
        """Generations without a row now, paused ones among them."""
        return len(self._queue) + len(self._paused)

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def alive(self) -> bool:
        """True while requests are taken."""
        return not self._closed and self.failed is None

    def close(self, *, drain: bool = True) -> None:
        """Take no more, and give the model its attention back. With ``drain`` what was submitted is answered first;
        else all of it is cancelled, running rows too."""
        with self._changed:
            self._closed = True
            if not drain:
                for job in self._jobs():
                    job.future.cancel()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.step():
                pass
        self._parked = []
        self._model.close()

    def forget(self) -> None:
        """Drop the keys and values that ended rows left: call it after the base's weights have changed."""
        with self._changed:
            self._parked = []

    # -------------------------------------------------------------------------------------- on the engine's thread

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self.waiting or self._rows)
                if not self.step() and self._closed:
                    return
        except BaseException as error:  # nothing of a single row's: those are caught where they arise
            _log.exception("the engine has failed; nothing more is generated")
            with self._changed:  # no request is taken after this
                self.failed = error
                jobs = self._jobs()
            for job in jobs:
                _fail(job, RuntimeError(f"the engine has failed: {error}"))
            if self.on_failure is not None:
                self.on_failure(error)
            self._leave_batch()

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit what there is room for, then run one forward. False where there was nothing to do."""
        with self._changed:
            self._drop_cancelled()
            self._admit()
        spans = self._plan()
        if spans:
            self.counts["steps"] += 1
            self.counts["step_rows"] += len(spans)
            self._run(spans)
        if not self._rows or self._thread is None:  # a caller's own thread runs the model as it is between steps
            self._leave_batch()
        return bool(spans or self._rows or self.waiting)

    def _drop_cancelled(self) -> None:
        self._queue.drop_cancelled()
        for row in [row for row in (*self._rows, *self._paused) if row.job.future.done()]:
            self._end(row)

    def _admit(self) -> None:
        """Give rows to what waits, in turn, while there are rows, room for its keys and values, and its adapter."""
        while len(self._rows) < self.max_rows:
            row = self._next_row()
            if row is None or not self._has_room(row):
                return
            self._rows.append(row)

    def _next_row(self) -> _Row | None:
        """The row whose turn it is, taken from where it waits; None where none may run now."""
        if self._paused:  # have been running: before all that is no more urgent
            row = min(self._paused, key=lambda row: row.rank)
            urgent = next(self._queue.order(), None)
            if urgent is None or urgent.priority >= row.job.priority:
                self._paused.remove(row)
                return row
        for job in self._queue.order():
            try:
                held = self.bank.hold([job.adapter])[0]
            except NoRoom as error:
                if self._rows or self._paused:  # whose adapters make room when they end
                    continue
                self._queue.remove(job)
                _fail(job, error)
                continue
            except Exception as error:
                self._queue.remove(job)
                _fail(job, error)
                continue
            self._queue.remove(job)
            return _Row(job, held, next(self._arrivals), self)
        return None

    def _has_room(self, row: _Row) -> bool:
        """Give the row a cache, with what of its beginning is known; where there is no room it is paused."""
        cache = RowCache(len(row.job.prompt) + row.most)
        taken = cache.next_capacity(len(row.tokens))
        if not self._free(taken):
            self._paused.append(row)
            return False
        row.cache = cache
        self._reuse(row)
        cache.reserve(len(row.tokens))
        return True

    def _free(self, tokens: int) -> bool:
        """Whether so many tokens more fit, once kept beginnings are dropped."""
        used = sum(row.cache.capacity for row in self._rows if row.cache is not None)
        while used + sum(parked.cache.capacity for parked in self._parked) + tokens > self.cache_tokens:
            if not self._parked:
                return False
            self._parked.pop(0)
        return True

    def _reuse(self, row: _Row) -> None:
        """Take over the longest beginning that a row with the same adapter content has, or will have."""
        assert row.cache is not None
        if row.job.prompt_logprobs:
            return
        most = len(row.tokens) - 1  # the last one's logits are needed
        content = row.held.content_hash
        there = [(p.tokens, p.cache) for p in self._parked if p.content_hash == content]
        there += [(r.tokens, r.cache) for r in self._rows if r.held.content_hash == content and r.cache is not None]
        shared = [(min(_in_common(row.tokens, tokens), most), cache) for tokens, cache in there]
        length, cache = max(shared, key=lambda pair: pair[0], default=(0, None))
        if cache is not None and length >= _WORTH_REUSING:
            row.source = cache, length

    def _ready(self, row: _Row) -> bool:
        """Whether the row may be computed: what it takes over is there, or will not come."""
        if row.source is None:
            return True
        cache, length = row.source
        if cache.length < length and any(other.cache is cache for other in self._rows):
            return False
        assert row.cache is not None
        length = min(length, cache.length)
        row.cache.copy_from(cache, length)
        row.source = None
        self.counts["cached_prompt_tokens"] += length
        return True

    def _plan(self) -> list[tuple[_Row, int]]:
        """Which rows run now, with how many tokens each: every one that generates, and some of the prompts."""
        ready = [row for row in self._rows if self._ready(row)]
        spans = [(row, 1) for row in ready if row.missing == 1]
        left = max(1, self.chunk_tokens - len(spans))
        prompts = sorted((row for row in ready if row.missing > 1), key=lambda row: row.rank)
        if prompts:  # half for the one whose turn it is, the rest for the shortest, so that neither waits for long
            first, others = prompts[0], sorted(prompts[1:], key=lambda row: row.missing)
            shares = {first: min(first.missing, left if not others else max(1, left // 2))}
            for row in (*others, first):
                more = min(row.missing - shares.get(row, 0), left - sum(shares.values()))
                shares[row] = shares.get(row, 0) + more
            spans += [(row, count) for row, count in shares.items() if count]
        spans = [(row, count) for row, count in spans if self._reserve(row, count)]
        return [(row, count) for row, count in spans if row in self._rows]  # not paused for a later one

    def _reserve(self, row: _Row, count: int) -> bool:
        """Make room for a row's next tokens, for which others may be paused, or the row itself."""
        if row not in self._rows:
            return False
        assert row.cache is not None
        tokens = row.cache.length + count
        while (more := row.cache.next_capacity(tokens) - row.cache.capacity) and not self._free(more):
            last = max(self._rows, key=lambda row: row.rank)
            self._pause(last)
            if last is row:
                return False
        row.cache.reserve(tokens)
        return True

    def _pause(self, row: _Row) -> None:
        self._rows.remove(row)
        self._paused.append(row)
        row.cache = row.source = None
        if row.notes_prompt:
            row.prompt_logprobs = []  # its prompt is computed from the beginning
        self.counts["preemptions"] += 1

    def _run(self, spans: Sequence[tuple[_Row, int]]) -> None:
        """One forward, and what follows from it; where it fails, each row alone, to find whose fault it is."""
        try:
            logits = self._forward(spans)
        except Exception as error:
            self._leave_batch()
            if len(spans) == 1:
                _fail(spans[0][0].job, error)
                self._end(spans[0][0])
                return
            for span in spans:
                self._run([span])
            return
        of_rows = logits.split([row.logits_of(count) for row, count in spans])
        drawn = []
        for (row, count), own in zip(spans, of_rows, strict=True):
            assert row.cache is not None
            row.cache.length += count
            self._queue.count(row.job.adapter, count)
            self.counts["prompt_tokens"] += max(0, min(count, len(row.job.prompt) - row.cache.length + count))
            if row.notes_prompt:
                self._note_prompt(row, count, own)
            if row.missing == 0:
                drawn.append((row, own[-1:]))
        if drawn:
            self._draw([row for row, _ in drawn], torch.cat([last for _, last in drawn]))

    def _forward(self, spans: Sequence[tuple[_Row, int]]) -> Tensor:
        tokens: list[int] = []
        keep: list[int] = []
        for row, count in spans:
            assert row.cache is not None
            begin = row.cache.length
            tokens += row.tokens[begin : begin + count]
            keep += range(len(tokens) - row.logits_of(count), len(tokens))
        self._enter_batch(spans)
        packed = [Span(row.cache, count) for row, count in spans if row.cache is not None]
        return self._model.forward(tokens, packed, keep)

    def _enter_batch(self, spans: Sequence[tuple[_Row, int]]) -> None:
        """Open the bank's batch of these rows, or stay in it where the last step had the same."""
        key = [(row.arrival, count) for row, count in spans]
        if self._batch is not None and self._batch[0] == key:
            return
        self._leave_batch()
        ends = itertools.accumulate((count for _, count in spans), initial=0)
        stack = ExitStack()
        stack.enter_context(self.bank.run([row.held for row, _ in spans], cu_seqlens=list(ends)))
        self._batch = key, stack

    def _leave_batch(self) -> None:
        if self._batch is not None:
            self._batch[1].close()
            self._batch = None

    def _note_prompt(self, row: _Row, count: int, logits: Tensor) -> None:
        """The log-probabilities of the prompt's tokens that follow those just seen."""
        assert row.cache is not None
        if not row.prompt_logprobs:
            row.prompt_logprobs.append(TokenLogprob(row.job.prompt[0], None, ()))
        following = row.job.prompt[row.cache.length - count + 1 : row.cache.length + 1]
        if following:
            row.prompt_logprobs += token_logprobs(logits[: len(following)], following, row.job.logprobs or 0)

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """The next token of each row, and what it ends."""
        raw = {row: logits[i : i + 1].clone() for i, row in enumerate(rows) if row.job.logprobs is not None}
        try:
            tokens = next_tokens(logits, [row.sampler for row in rows])
        except Exception as error:
            if len(rows) == 1:
                _fail(rows[0].job, error)
                self._end(rows[0])
                return
            for i, row in enumerate(rows):
                self._draw([row], logits[i : i + 1])
            return
        now = time.monotonic()
        for row, token in zip(rows, tokens, strict=True):
            row.first = row.first or now
            if row in raw and row.job.logprobs is not None:
                row.logprobs += token_logprobs(raw[row], [token], row.job.logprobs)
            try:
                self._take(row, token)
            except Exception as error:
                _fail(row.job, error)
                self._end(row)

    def _take(self, row: _Row, token: int) -> None:
        self.counts["generated_tokens"] += 1
        reason: str | None = None
        stop_reason: str | int | None = None
        if token in row.ends:
            reason = "stop"
            del row.logprobs[len(row.generated) :]
        else:
            row.sampler.add(token)
            row.generated.append(token)
            row.tokens.append(token)
            if token in row.stops:
                reason, stop_reason = "stop", row.stops[token]
            if reason is None or row.job.include_stop:
                row.piece += row.text.add(token)
            if row.text.found is not None:
                reason, stop_reason = "stop", row.text.found
            elif reason is None and row.sampler.complete:
                reason = "stop"
            elif reason is None and len(row.generated) >= row.most:
                reason = "length"
        if reason is not None:
            row.piece += row.text.end()
        if row.job.on_delta is not None and (row.piece or reason is not None) and not row.job.future.done():
            row.job.on_delta(Delta(row.piece, row.generated[row.told :], row.logprobs[row.told :], reason))
            row.told, row.piece = len(row.generated), ""
        if reason is not None:
            times = Times(row.job.submitted, row.started, row.first, time.monotonic())
            of_prompt = row.prompt_logprobs
            text = row.text.text
            _finish(row.job, Completion(row.generated, text, reason, stop_reason, row.logprobs, of_prompt, times))
            self._end(row)

    def _end(self, row: _Row) -> None:
        """Give back what a row holds; its keys and values stay for one that begins alike."""
        (self._rows if row in self._rows else self._paused).remove(row)
        self.bank.release([row.held])
        cache, row.cache = row.cache, None
        if cache is not None and cache.length >= _WORTH_REUSING:
            self._parked.append(_Parked(row.held.content_hash, row.tokens[: cache.length], cache))


def _in_common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def _finish(job: Generation, completion: Completion) -> None:
    if not job.future.done() and job.future.set_running_or_notify_cancel():
        job.future.set_result(completion)


def _fail(job: Generation, error: BaseException) -> None:
    if not job.future.done() and job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)


__all__ = ["Engine"]
