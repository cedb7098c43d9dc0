"""Which batch a layer runs in: its thread's or task's, the starting thread's, or that of the forward it repeats."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

from .rows import SequenceBatch

_log = logging.getLogger(__name__)
_KEPT = 64  # spans of a thread that are told apart


class Batch(SequenceBatch):
    """A batch of sequences for the layers of one :class:`Batches`, while its context is open."""

    def __init__(self, op: str, adapter_ids: Any, cu_seqlens: Any = None) -> None:
        super().__init__(op, adapter_ids, cu_seqlens)
        self.ended = False
        self.outer: Batch | None = None  # the one around it in its thread, of whatever layers
        self.owner: Batches[Batch] | None = None
        self.backward = -1  # the backward pass in which it was opened, if any
        self.thread = 0  # that opened it
        self.spans: dict[threading.Thread, _Span] = {}  # of the threads that ran in it
        self.older: frozenset[threading.Thread] = frozenset()  # those there were when it was opened


B = TypeVar("B", bound=Batch)
_innermost: ContextVar[Batch | None] = ContextVar("lowrank_kernels_batch", default=None)


@dataclass(eq=False)
class _Span:
    """Nodes of autograd that a thread made in a batch: numbers from ``first`` up to ``end``, None while it is open."""

    first: int
    batch: Batch | None  # None: it has ended
    around: _Span | None = None
    last: int = 0  # how many nodes the thread had made when it was last seen here
    end: int | None = None

    def holds(self, node: int) -> bool:
        return self.first <= node and (self.end is None or node < self.end)


class Batches(Generic[B]):
    """The open batches that layers find theirs in: one object for the layers of a bank, one for those that train.

    A layer runs in the innermost batch of its thread or asyncio task. A thread without one, that was started since a
    batch was opened, runs in that one, as with a text streamer. What autograd calls runs in the batch of the forward
    that it repeats, whatever thread that is on: activation checkpointing gets the same adapters again. Numbers that a
    thread gives to its nodes in ascending order tell which batch that was.
    """

    def __init__(self, op: str, base_alone: str) -> None:
        self.op, self.base_alone = op, base_alone  # names in messages: of the context, and how to open it for the base
        self._lock = threading.RLock()  # a context that is collected ends in whatever thread is here
        self._open: list[B] = []
        self._spans: dict[threading.Thread, list[_Span]] = {}
        self._told = False

    @contextmanager
    def open(self, batch: B) -> Iterator[None]:
        """Context in which ``batch`` is the innermost one."""
        around = self._of_context()
        batch.owner, batch.outer = self, _innermost.get()  # type: ignore[assignment]
        batch.backward = torch._C._current_graph_task_id()
        batch.older = frozenset(threading.enumerate())
        batch.thread = threading.get_ident()
        with self._lock:
            self._open.append(batch)
            self._add_span(
                batch, _nodes_made(), None if around is None else around.spans.get(threading.current_thread())
            )
        _innermost.set(batch)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(batch)
                self._end(batch)
            # A generator may leave it in another context than it entered it in, or after a context inside of it.
            if _innermost.get() is batch:
                outer = batch.outer
                while outer is not None and outer.ended:
                    outer = outer.outer
                _innermost.set(outer)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.op}: expected a model without a bank to copy or to pickle; close() the bank first")

    def _of_context(self) -> Batch | None:
        batch = _innermost.get()
        while batch is not None and batch.owner is not self:
            batch = batch.outer
        return batch

    def current(self) -> B | None:
        """The batch that a layer runs in; None where none is open.

        Raises:
            RuntimeError: one is open elsewhere, and nothing says whether the layer runs in it; it has ended.
        """
        batch = self._of_context()
        if torch.compiler.is_compiling():
            return batch  # type: ignore[return-value]
        backward = torch._C._current_graph_task_id()
        if backward != -1 and (batch is None or batch.backward != backward):
            node = _node_of_forward()
            if node is not None:
                return self._of_node(node)
        if batch is None:
            return self._of_younger_thread() if self._open else None
        if batch.ended:
            raise RuntimeError(f"{self.op}: expected a layer to run before its batch has ended; wait for it in there")
        if threading.get_ident() != batch.thread:
            self._run_elsewhere(batch)
        return batch  # type: ignore[return-value]

    def _of_younger_thread(self) -> B:
        thread = threading.current_thread()
        with self._lock:
            there = list(self._open)
        inside = [batch for batch in there if thread not in batch.older]
        around = [batch.outer for batch in inside]
        inside = [batch for batch in inside if not any(batch is outer for outer in around)]
        if len(inside) != 1:
            raise RuntimeError(
                f"{self.op}: expected a layer in thread {thread.name!r} to run in a batch, since {len(there)} "
                f"{'is' if len(there) == 1 else 'are'} open elsewhere, got none of its own; open one in this thread, "
                f"{self.base_alone} for the base alone"
            )
        if not self._told:
            self._told = True
            _log.warning("%s: thread %s has no batch of its own and runs in the one that is open", self.op, thread.name)
        self._run_elsewhere(inside[0])
        return inside[0]

    # ------------------------------------------------------------------------------------------ what autograd repeats

    def _add_span(self, batch: Batch, first: int, around: _Span | None = None) -> _Span:
        thread = threading.current_thread()
        spans = self._spans.setdefault(thread, [])
        span = batch.spans[thread] = _Span(first, batch, around)
        spans.append(span)
        if len(spans) > _KEPT:  # old ones become one, which still says that the batch has ended
            for i, (one, two) in enumerate(pairwise(spans)):
                if one.batch is two.batch is None and one.around is two.around:
                    last = max(one.last, two.last)
                    spans[i : i + 2] = [_Span(min(one.first, two.first), None, one.around, last, last)]
                    break
        return span

    def _run_elsewhere(self, batch: Batch) -> None:
        """Note that this thread, which did not open the batch, runs a layer in it."""
        thread = threading.current_thread()
        with self._lock:
            span = batch.spans.get(thread)
            if span is None:
                before = self._spans.get(thread, [])
                span = self._add_span(batch, max((other.last for other in before), default=0))
            span.last = _nodes_made()

    def _end(self, batch: Batch) -> None:
        batch.ended, here = True, threading.current_thread()
        for thread, span in batch.spans.items():
            if thread is here:
                span.last = _nodes_made()
            # Elsewhere nodes may have been made since: those of a checkpoint that is not reentrant, which itself finds
            # that the base alone is not what it ran.
            span.batch, span.end = None, span.last
            if span.last == span.first:  # no gradients: nothing that could be run again
                self._spans[thread].remove(span)
                if not self._spans[thread]:
                    del self._spans[thread]
        batch.forget_plans()

    def _of_node(self, node: int) -> B | None:
        """The batch in which a node of autograd was made; None for one outside of any.

        Raises:
            RuntimeError: it has ended; there are several that it may be.
        """
        # Threads count their nodes by themselves: this one is the likeliest to have made it, a finished one the least.
        here = threading.current_thread()
        with self._lock:
            found = _made_in(node, self._spans.get(here, []))
            for alive in (True, False):
                others = [spans for thread, spans in self._spans.items() if thread.is_alive() == alive]
                found = found or [span for spans in others for span in _made_in(node, spans)]
        if any(span.batch is None for span in found):
            raise RuntimeError(
                f"{self.op}: expected backward, which runs a layer again, before its batch has ended; "
                f"call backward inside of the context"
            )
        if len({id(span.batch) for span in found}) > 1:
            raise RuntimeError(
                f"{self.op}: expected backward, which runs a layer again, to be of one batch, got one of {len(found)}; "
                f"call it on the thread of its forward, with no other batch open there"
            )
        return found[0].batch if found else None  # type: ignore[return-value]


def _nodes_made() -> int:
    """How many nodes of autograd this thread has made: the number of its next one."""
    return torch._C._autograd._get_sequence_nr()


def _made_in(node: int, spans: list[_Span]) -> list[_Span]:
    """The innermost span, of one thread, with a node; and those that overlap with it without being around it."""
    found = [span for span in reversed(spans) if span.holds(node)]
    around = found[0].around if found else None
    while around is not None:
        found = [span for span in found if span is not around]
        around = around.around
    return found


def _node_of_forward() -> int | None:
    """Number of the node that autograd works at and that a forward made; None if it is no such node's turn.

    A node that reentrant checkpointing makes while it recomputes is not of that forward: what counts is the node
    that recomputes, of the outermost such call.
    """
    node = torch._C._current_autograd_node()
    checkpoint = sys.modules.get("torch.utils.checkpoint")
    frame: FrameType | None = sys._getframe(1)
    code = checkpoint.CheckpointFunction.backward.__code__ if checkpoint is not None else None
    while frame is not None:
        if frame.f_code is code:
            node = frame.f_locals["ctx"]
        frame = frame.f_back
    number = -1 if node is None else node._sequence_nr()
    return number if 0 <= number < 2**63 else None
