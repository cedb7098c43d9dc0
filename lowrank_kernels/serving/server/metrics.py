"""What the server counts, in Prometheus' form, and the log of requests."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .errors import error_response

_log = logging.getLogger("lowrank_kernels.access")

MOST_NAMES = 100
"""Models with series of their own; what others do is counted as that of "other"."""

_WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters and histograms of one server.

    Args:
        now: (name, help, value, True for a counter) of what others count, read when the metrics are.
    """

    def __init__(self, now: Callable[[], Iterable[tuple[str, str, float, bool]]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lrk_requests", "Requests, by path and status.", ["path", "status"], registry=registry)
        self.loads = Counter("lrk_adapter_loads", "Requests to load an adapter.", ["result"], registry=registry)
        self.cancelled = Counter("lrk_cancelled", "Rows whose client went before the end.", registry=registry)
        self._by_model: tuple[Any, ...] = (
            prompt := Counter("lrk_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry),
            generated := Counter("lrk_generated_tokens", "Tokens generated.", ["model"], registry=registry),
            queue := _histogram("lrk_queue_seconds", "From the request to the row's start.", _WAITS, registry),
            first := _histogram("lrk_time_to_first_token_seconds", "From the request.", _WAITS, registry),
            between := _histogram(
                "lrk_time_between_tokens_seconds", "A row's mean, after its first.", _BETWEEN, registry
            ),
            whole := _histogram("lrk_row_seconds", "From the request to the row's end.", _WAITS, registry),
        )
        self._prompt, self._generated, self._queue, self._first = prompt, generated, queue, first
        self._between, self._whole = between, whole
        self._names: set[str] = set()
        self._lock = threading.Lock()
        registry.register(_Now(now))
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def row(self, model: str, prompt: int, generated: int, times: Any) -> None:
        """Count a row that has ended: its tokens, and ``Times`` from the engine."""
        name = self._series(model)
        self._prompt.labels(name).inc(prompt)
        self._generated.labels(name).inc(generated)
        self._queue.labels(name).observe(times.started - times.queued)
        self._first.labels(name).observe(times.first - times.queued)
        self._whole.labels(name).observe(times.ended - times.queued)
        if generated > 1:
            self._between.labels(name).observe((times.ended - times.first) / (generated - 1))

    def forget(self, model: str) -> None:
        """Drop the series of a model that is gone, so that another may have them."""
        with self._lock:
            if model not in self._names:
                return
            self._names.discard(model)
        for family in self._by_model:
            with suppress(KeyError):
                family.remove(model)

    def _series(self, model: str) -> str:
        with self._lock:
            if model not in self._names and len(self._names) >= MOST_NAMES:
                return "other"
            self._names.add(model)
        return model


def _histogram(name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, ["model"], buckets=buckets, registry=registry)


class _Now:
    """What others count, as metrics."""

    def __init__(self, now: Callable[[], Iterable[tuple[str, str, float, bool]]]) -> None:
        self._now = now

    def collect(self) -> Iterable[Metric]:
        for name, text, value, counter in self._now():
            yield (CounterMetricFamily if counter else GaugeMetricFamily)(name, text, value=value)


class Observer:
    """ASGI middleware: counts requests and writes a line about each to the log, when its answer has ended.

    A line is: client, method, path, status, seconds, then what the endpoint noted in ``request.state.note``.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def seen(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except asyncio.CancelledError:  # the server ends, and its grace is over
            if not status:
                await error_response(503, "the server is shutting down")(scope, receive, seen)
        except Exception:
            status = status or 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # few, whatever paths are asked for
            self.metrics.requests.labels(route, status or "gone").inc()
            if _log.isEnabledFor(logging.INFO):
                client = (scope.get("client") or ("-",))[0]
                path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
                note = scope.get("state", {}).get("note", "")
                _log.info(
                    "%s %s %s %s %.3fs %s",
                    client,
                    scope["method"],
                    path,
                    status or "gone",
                    time.perf_counter() - start,
                    note,
                )
