"""What the server counts, and the text that Prometheus reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any


class Metrics:
    """Counters by name and labels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, float]] = {}

    def add(self, name: str, value: float = 1, **labels: object) -> None:
        key = ",".join(f'{label}="{text}"' for label, text in labels.items())
        with self._lock:
            of_name = self._counts.setdefault(name, {})
            of_name[key] = of_name.get(key, 0) + value

    def text(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> str:
        """All counters, then others that are counted elsewhere, and gauges, in Prometheus' text format."""
        every: dict[str, tuple[str, dict[str, float]]]
        with self._lock:
            every = {name: ("counter", dict(values)) for name, values in self._counts.items()}
        every |= {name: ("counter", {"": value}) for name, value in counters.items()}
        every |= {name: ("gauge", {"": value}) for name, value in gauges.items()}
        lines = []
        for name, (kind, values) in every.items():
            lines.append(f"# TYPE {name} {kind}")
            lines += [
                f"{name}{{{key}}} {value:.10g}" if key else f"{name} {value:.10g}" for key, value in values.items()
            ]
        return "\n".join(lines) + "\n"


class CountRequests:
    """ASGI middleware: counts requests of the API by status, and their seconds."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        start = time.perf_counter()

        async def seen(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.add("lrk_requests_total", status=message["status"])
                self.metrics.add("lrk_request_seconds_total", time.perf_counter() - start)
            await send(message)

        return await self.app(scope, receive, seen)
