"""The next token of each row: what its settings make of the logits, and the draw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .generation import Generation, TokenLogprob

_LIKELY = 1024  # tokens among which most top_p's end


class Sampler:
    """Draws one row's tokens, with a generator of its own: no row's draw depends on the batch around it.

    The order of what changes the logits: ``logit_bias``, the constraint, ``min_tokens``, penalties, temperature,
    ``min_p``, ``top_k``, ``top_p``.

    Args:
        job: whose settings count.
        ends: tokens that may not come before ``min_tokens``.
    """

    def __init__(self, job: Generation, ends: Collection[int]) -> None:
        self.job, self.ends = job, list(ends)
        self.counts: Counter[int] = Counter()  # of the tokens generated
        self.matcher = None if job.constraint is None else job.constraint.matcher()
        self.bias = list(job.logit_bias), list(job.logit_bias.values())
        self.prompt = sorted(set(job.prompt)) if job.repetition_penalty != 1.0 else []
        self.generator = torch.Generator()
        if not job.greedy:
            if job.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(job.seed)

    @property
    def plain(self) -> bool:
        """True if the next token is the logits' largest."""
        job = self.job
        penalties = job.presence_penalty or job.frequency_penalty or job.repetition_penalty != 1.0
        early = sum(self.counts.values()) < job.min_tokens
        return job.greedy and not (penalties or self.bias[0] or self.matcher is not None or early)

    def add(self, token: int) -> None:
        """Note a token that was generated."""
        self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.add(token)

    @property
    def complete(self) -> bool:
        """True once the constraint lets nothing follow."""
        return self.matcher is not None and self.matcher.complete

    def draw(self, logits: Tensor) -> int:
        """The next token, from logits (vocabulary,) in float32, which are changed."""
        job = self.job
        if self.bias[0]:
            logits[self.bias[0]] += torch.tensor(self.bias[1], device=logits.device)
        if self.matcher is not None:
            self.matcher.mask_(logits)
        if sum(self.counts.values()) < job.min_tokens:
            logits[self.ends] = -torch.inf
        if job.repetition_penalty != 1.0:
            seen = sorted({*self.prompt, *self.counts})
            there = logits[seen]
            logits[seen] = torch.where(there > 0, there / job.repetition_penalty, there * job.repetition_penalty)
        if self.counts and (job.presence_penalty or job.frequency_penalty):
            times = torch.tensor(list(self.counts.values()), dtype=torch.float32, device=logits.device)
            logits[list(self.counts)] -= job.presence_penalty + job.frequency_penalty * times
        if job.greedy:
            return int(logits.argmax())
        logits /= job.temperature
        _keep_likely_(logits, job)
        # The largest of logits + Gumbel noise is drawn from softmax(logits).
        noise = torch.empty(logits.shape).exponential_(generator=self.generator).log_()
        return int(logits.sub_(noise.to(logits.device)).argmax())


def _keep_likely_(logits: Tensor, job: Generation) -> None:
    """Set to -inf what ``min_p``, ``top_k`` and ``top_p`` leave out; the likeliest token always stays."""
    if job.min_p > 0.0:
        logits[logits < logits.max() + math.log(job.min_p)] = -torch.inf
    if 0 < job.top_k < logits.numel():
        logits[logits < logits.topk(job.top_k).values[-1]] = -torch.inf
    if job.top_p < 1.0:
        total = logits.logsumexp(0)
        ordered, order = logits.topk(min(_LIKELY, logits.numel()))
        share = (ordered - total).exp()
        if float(share.sum()) < job.top_p:
            ordered, order = logits.sort(descending=True)
            share = (ordered - total).exp()
        kept = order[share.cumsum(0) - share < job.top_p]
        values = logits[kept]
        logits.fill_(-torch.inf)[kept] = values


def next_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row, from logits (rows, vocabulary), which may be changed."""
    likeliest = logits.argmax(-1).tolist() if any(s.plain for s in samplers) else [0] * len(samplers)
    return [
        token if sampler.plain else sampler.draw(row.float())
        for token, row, sampler in zip(likeliest, logits, samplers, strict=True)
    ]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of each token under its row of logits (len(tokens), vocabulary), with the ``top`` likeliest tokens beside it."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(top)
    likeliest = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*one) for one in zip(tokens, own, likeliest, strict=True)]


__all__ = ["Sampler", "next_tokens", "token_logprobs"]
