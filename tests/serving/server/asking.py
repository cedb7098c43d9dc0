"""A client in the same process, and the requests that tests send."""

import asyncio
import json
import threading

import httpx

PATIENCE = 60.0
"""Seconds until a test gives up what never comes; nothing waits so long otherwise."""

CHAT = {"messages": [{"role": "user", "content": "Who?"}], "max_completion_tokens": 5, "temperature": 0}


class Client:
    """Requests in one process, each awaited or all at once."""

    def __init__(self, app):
        self.transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def all(self, *requests):
        async def send():
            async with httpx.AsyncClient(transport=self.transport, base_url="http://localhost", timeout=30) as client:
                return await asyncio.gather(*(client.request(*r[:2], **(r[2] if r[2:] else {})) for r in requests))

        return asyncio.run(send())

    def get(self, path, **options):
        return self.all(("GET", path, options))[0]

    def post(self, path, body=None, **options):
        return self.all(("POST", path, ({"json": body} if body is not None else {}) | options))[0]

    def stream(self, path, body):
        """The chunks of a streamed answer, which has to end as it should."""
        reply = self.post(path, {**body, "stream": True})
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
        *events, done, rest = reply.text.split("\n\n")
        assert done == "data: [DONE]" and rest == ""
        return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


class Held:
    """Holds the model's forward, so that rows run for as long as a test wants."""

    def __init__(self, model):
        self.entered, self.go = threading.Event(), threading.Event()
        model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.entered.set()
        assert self.go.wait(PATIENCE)


def prompt_of(row):
    return [(7 * i + 3 * row) % 62 + 1 for i in range(3 + row)]


def body(name, row, **options):
    return {"model": name or "tiny", "prompt": prompt_of(row), "max_tokens": 3 + row, "temperature": 0, **options}
