"""Generations that wait: by priority, and among equals by what their adapters have had so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .generation import Generation


class FairQueue:
    """Generations that wait for a row, those of one adapter in order.

    The next one is of the smallest priority there is, then of the adapter that has had the fewest tokens: the virtual
    token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). An adapter that comes back
    starts at the least of those that wait, so that it gathers no credit while it asks for nothing.
    """

    def __init__(self) -> None:
        self._waiting: dict[str | None, deque[Generation]] = {}
        self._tokens: dict[str | None, int] = {}  # that each adapter has had

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Generation]:
        return (job for jobs in list(self._waiting.values()) for job in list(jobs))

    def add(self, job: Generation, *, first: bool = False) -> None:
        """Put a generation behind those of its adapter, or before them."""
        if job.adapter not in self._waiting:
            least = min((self._tokens[adapter] for adapter in self._waiting), default=0)
            self._tokens[job.adapter] = max(self._tokens.get(job.adapter, 0), least)
            self._waiting[job.adapter] = deque()
        jobs = self._waiting[job.adapter]
        if first:
            jobs.appendleft(job)
        else:
            jobs.append(job)

    def count(self, adapter: str | None, tokens: int) -> None:
        """Note that an adapter's rows had so many tokens."""
        self._tokens[adapter] = self._tokens.get(adapter, 0) + tokens

    def order(self) -> Iterator[Generation]:
        """Each adapter's next generation, the one whose turn it is first."""
        best = [min(jobs, key=lambda job: job.priority) for jobs in self._waiting.values()]
        return iter(sorted(best, key=lambda job: (job.priority, self._tokens[job.adapter])))

    def remove(self, job: Generation) -> None:
        jobs = self._waiting[job.adapter]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.adapter]

    def drop_cancelled(self) -> None:
        for job in self:
            if job.future.done():
                self.remove(job)

    def forget(self, adapter: str | None) -> None:
        """Forget what an adapter has had, which is no more there."""
        if adapter not in self._waiting:
            self._tokens.pop(adapter, None)


__all__ = ["FairQueue"]
