"""``Batcher``: waiting requests for different adapters, gathered into batches that one thread generates."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bank import AdapterBank
from .conversation import chat_template, unused_tokenizer

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full; the request may be sent again later."""


class Closed(Exception):
    """The batcher takes no requests any more."""


class Completion(NamedTuple):
    """The answer to one :class:`Generation`."""

    tokens: list[int]  # an end-of-text token at the end is not one of them
    text: str  # up to the stop string, without it
    finish_reason: str  # "stop", or "length" after max_tokens


@dataclass(eq=False)
class Generation:
    """One sequence to generate, and where its completion will be. ``future.cancel()`` ends it, running or not.

    Args:
        adapter: of the bank; None for the base alone.
        prompt: token ids, at least one.
        max_tokens: to generate at most, at least one.
        stop: texts that end it.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: draw only among the likeliest tokens that together have this probability.
        seed: of what is drawn, whatever else is in the batch; None for any.
    """

    adapter: str | None
    prompt: list[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    future: Future[Completion] = field(default_factory=Future)


class _Rows:
    """The rows of a running batch: draws each row's next token, and ends each at its own end (both ask `generate`)."""

    def __init__(self, jobs: Sequence[Generation], length: int, tokenizer: Any, ends: frozenset[int]) -> None:
        self.jobs, self.length, self.tokenizer, self.ends = jobs, length, tokenizer, ends
        # Stop texts that are special tokens, which decoding leaves out.
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        self.stop_tokens = [{tokenizer.convert_tokens_to_ids(s) for s in job.stop if s in special} for job in jobs]
        self.generators: list[torch.Generator] = []
        for job in jobs:
            generator = torch.Generator()
            if job.seed is None:
                generator.seed()
            else:
                generator.manual_seed(job.seed)
            self.generators.append(generator)

    def draw(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores whose largest is the next token: argmax(logits / T + Gumbel noise) draws from softmax(logits / T)."""
        if not any(job.temperature for job in self.jobs):
            return scores
        scores = scores.float().clone()
        for row, (job, generator) in enumerate(zip(self.jobs, self.generators, strict=True)):
            if job.temperature:
                logits = scores[row] / job.temperature
                if job.top_p < 1.0:
                    ordered, order = logits.sort(descending=True)
                    share = ordered.softmax(0)
                    logits[order[share.cumsum(0) - share >= job.top_p]] = -torch.inf  # the first one always stays
                noise = torch.empty(logits.shape).exponential_(generator=generator).log_()
                scores[row] = logits - noise.to(logits.device)
        return scores

    def done(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows need no further token; a row's completion is given out at once."""
        tokens = input_ids[:, self.length :].tolist()
        rows = zip(self.jobs, tokens, self.stop_tokens, strict=True)
        done = [self._ended(job, of_row, stops) for job, of_row, stops in rows]
        return torch.tensor(done, device=input_ids.device)

    def _ended(self, job: Generation, tokens: list[int], stop_tokens: set[int]) -> bool:
        if job.future.done():
            return True
        reason = "length" if len(tokens) >= job.max_tokens else None
        if tokens[-1] in self.ends:
            tokens, reason = tokens[:-1], "stop"
        elif tokens[-1] in stop_tokens:
            reason = "stop"
        if reason is None and not job.stop:
            return False
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        found = [at for at in (text.find(stop) for stop in job.stop) if at >= 0]
        if found:
            text, reason = text[: min(found)], "stop"
        if reason is None:
            return False
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(Completion(tokens, text, reason))
        return True


class Batcher:
    """Gathers waiting generations, of whatever adapters, and runs them as one batch of ``bank.model.generate``.

    A batch starts when ``max_batch`` generations wait, or ``wait_seconds`` after its first; it runs until its last row
    has ended, and each row is answered when it ends itself. A batch that fails is run again in halves, so that what is
    wrong with one generation (its adapter was unloaded, say) is told to that one alone.

    Args:
        bank: of the adapters; its model generates.
        tokenizer: of the model, for stop strings and text.
        max_batch: rows of a batch.
        wait_seconds: for more rows, once there is one.
        max_queue: generations that may wait.
        max_length: tokens of a prompt and its completion; default: the positions that the model has. A batch's longest
            prompt and largest ``max_tokens`` together keep to it too.

    Raises:
        ValueError: a limit below 1, a negative wait, a ``max_length`` beyond what the model has.
    """

    def __init__(
        self,
        bank: AdapterBank,
        tokenizer: Any,
        *,
        max_batch: int = 16,
        wait_seconds: float = 0.005,
        max_queue: int = 256,
        max_length: int | None = None,
    ) -> None:
        config: Any = bank.model.config
        positions = getattr(config, "max_position_embeddings", None)
        max_length = max_length if max_length is not None else positions or 2048
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"Batcher: expected {name} to be at least 1, got {value}")
        if wait_seconds < 0:
            raise ValueError(f"Batcher: expected wait_seconds to be at least 0, got {wait_seconds}")
        if positions is not None and max_length > positions:
            raise ValueError(f"Batcher: expected max_length to be at most the model's {positions}, got {max_length}")
        self.bank, self.tokenizer = bank, tokenizer
        self.chat_templates: dict[str, str] = {}  # of adapters that have one of their own
        self.max_batch, self.wait_seconds, self.max_queue = max_batch, wait_seconds, max_queue
        self.max_length, self.vocabulary = max_length, int(config.vocab_size)
        self.batches = self.rows = self.running = 0
        model: Any = bank.model
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._ends = frozenset([*ends, *own])
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._batch: Sequence[Generation] = ()  # that runs
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def load(self, name: str, folder: Path, *, pin: bool = False) -> str | None:
        """Serve a PEFT folder as ``name``, with the chat template in it, if there is one.

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

    def submit(self, jobs: Sequence[Generation]) -> None:
        """Queue all of these, or none.

        Raises:
            ValueError: an empty prompt, a token id out of range, ``max_tokens`` below 1, more than ``max_length``.
            QueueFull: no room for all of them.
            Closed: after ``close``.
        """
        for job in jobs:
            total = len(job.prompt) + job.max_tokens
            if not job.prompt or job.max_tokens < 1:
                raise ValueError("expected a prompt of at least one token, and max_tokens of at least 1")
            if total > self.max_length:
                raise ValueError(
                    f"expected prompt and completion within {self.max_length} tokens, got "
                    f"{len(job.prompt)} and max_tokens={job.max_tokens}; shorten the prompt or lower max_tokens"
                )
            if min(job.prompt) < 0 or max(job.prompt) >= self.vocabulary:
                raise ValueError(f"expected token ids from 0 to {self.vocabulary - 1}, got {job.prompt[:8]}")
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFull(f"{len(self._waiting)} of {self.max_queue} places of the queue are taken")
            self._waiting.extend(jobs)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """True while requests are taken."""
        return self._thread.is_alive() and not self._closed

    def close(self, *, drain: bool = True) -> None:
        """Take no more. With ``drain`` waiting ones are answered; else all are cancelled, running ones too."""
        with self._changed:
            self._closed = True
            if not drain:
                for job in self._waiting:
                    job.future.cancel()
                for job in self._batch:
                    job.future.cancel()
            self._changed.notify()
        self._thread.join()

    # --------------------------------------------------------------------------------------- on the batcher's thread

    def _work(self) -> None:
        while (jobs := self._gather()) is not None:
            self.running = len(jobs)
            self._run(jobs)
            self.running, self._batch = 0, ()

    def _gather(self) -> list[Generation] | None:
        """The next batch; None when closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            until = time.monotonic() + self.wait_seconds
            while len(self._waiting) < self.max_batch and not self._closed:
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    break
            if not self._waiting:
                return None
            taken: list[Generation] = []
            kept: deque[Generation] = deque()
            longest = most = 0
            for job in self._waiting:
                if job.future.cancelled():
                    continue
                both = max(longest, len(job.prompt)), max(most, job.max_tokens)
                if len(taken) < self.max_batch and sum(both) <= self.max_length:
                    taken.append(job)
                    longest, most = both
                else:
                    kept.append(job)
            self._waiting, self._batch = kept, taken
            return taken

    def _run(self, jobs: Sequence[Generation]) -> None:
        jobs = [job for job in jobs if not job.future.done()]
        if not jobs:
            return
        try:
            with self.bank.batch([job.adapter for job in jobs]):
                self._generate(jobs)
        except Exception as error:
            if len(jobs) == 1:
                future = jobs[0].future
                if not future.done() and future.set_running_or_notify_cancel():
                    future.set_exception(error)
                return
            for half in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
                self._run(half)

    @torch.inference_mode()
    def _generate(self, jobs: Sequence[Generation]) -> None:
        model: Any = self.bank.model
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else next(iter(self._ends), 0)
        length = max(len(job.prompt) for job in jobs)
        tokens = torch.tensor([[pad] * (length - len(job.prompt)) + job.prompt for job in jobs], device=model.device)
        mask = torch.tensor(
            [[0] * (length - len(job.prompt)) + [1] * len(job.prompt) for job in jobs], device=model.device
        )
        rows = _Rows(jobs, length, self.tokenizer, self._ends)
        self.batches += 1
        self.rows += len(jobs)
        model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            use_cache=True,
            max_new_tokens=max(job.max_tokens for job in jobs),
            logits_processor=[rows.draw],
            stopping_criteria=[rows.done],
        )
