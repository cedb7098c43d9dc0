"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .constraints import Constraint


class QueueFull(Exception):
    """The queue is full; the request may be sent again later."""


class Closed(Exception):
    """The engine takes no requests any more."""


class TokenLogprob(NamedTuple):
    """A token with its natural log-probability under the model, before any setting of the sampler changes it."""

    token: int
    logprob: float | None  # None for the first token of a prompt, which nothing stands before
    top: tuple[tuple[int, float], ...]  # the likeliest tokens with theirs, likeliest first


class Delta(NamedTuple):
    """What has come since the last one: text that no stop text can take back, and the tokens drawn."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None  # of the last one


class Times(NamedTuple):
    """When, in seconds of ``time.monotonic``."""

    queued: float
    started: float
    first: float  # token
    ended: float


class Completion(NamedTuple):
    """The answer to one :class:`Generation`."""

    tokens: list[int]  # an end-of-text token at the end is not one of them
    text: str  # up to the stop text, without it
    finish_reason: str  # "stop", or "length" after max_tokens
    stop_reason: str | int | None  # the stop text, or token id of ``stop_token_ids``, that ended it
    logprobs: list[TokenLogprob]  # of each token, where asked for
    prompt_logprobs: list[TokenLogprob]
    times: Times


@dataclass(eq=False)
class Generation:
    """One sequence to generate, and where its completion will be. ``future.cancel()`` ends it, running or not.

    Args:
        adapter: of the bank; None for the base alone.
        prompt: token ids, at least one.
        max_tokens: to generate at most, at least one; None for as many as the engine's ``max_length`` leaves.
        stop: texts that end it; one that is a special token ends it by its id.
        stop_token_ids: tokens that end it.
        ignore_eos: go on after an end-of-text token.
        min_tokens: before which neither an end-of-text token nor one of ``stop_token_ids`` is drawn.
        include_stop: leave the stop text at the end of the text.
        temperature: below 1e-5 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: draw only among the likeliest tokens that together have this probability.
        top_k: draw only among so many likeliest tokens; 0 for all.
        min_p: draw only among tokens of at least this share of the likeliest one's probability.
        presence_penalty: taken off the logits of tokens that were generated.
        frequency_penalty: taken off for each time that they were.
        repetition_penalty: divides positive, multiplies negative logits of tokens of the prompt or generated.
        logit_bias: added to the logits of tokens by id.
        seed: of what is drawn, whatever else is in the batch; None for any.
        logprobs: how many likeliest tokens to report beside each one's log-probability; None for none of it.
        prompt_logprobs: report the same of the prompt's tokens.
        constraint: a grammar that the text keeps to.
        priority: smaller runs sooner.
        on_delta: called on the engine's thread with each piece, the last of which has a ``finish_reason``.
    """

    adapter: str | None
    prompt: list[int]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    priority: int = 0
    on_delta: Callable[[Delta], None] | None = None
    future: Future[Completion] = field(default_factory=Future)
    submitted: float = field(default=0.0, init=False)  # when, by ``time.monotonic``

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


__all__ = ["Closed", "Completion", "Delta", "Generation", "QueueFull", "Times", "TokenLogprob"]
