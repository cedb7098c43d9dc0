"""What is refused, with which status, and how little work and how few bytes that takes."""

import json
import time

import pytest

from lowrank_kernels.serving.server import create_app
from tests.serving.server.asking import CHAT, Client, Held, body

CHAT_BODY = {"model": "lora", **CHAT}
REFUSED = [
    (404, "model", "there is no model 'nobody'", {"model": "nobody"}),
    (400, None, "expected prompt and completion within 64 tokens", {"max_tokens": 62}),
    (400, None, "expected token ids from 0 to 63", {"prompt": [3, 64]}),
    (400, None, "expected token ids from 0 to 63", {"prompt": [-1]}),
    (400, None, "expected a prompt of at least one token", {"prompt": ""}),
    (400, None, "at most 64 characters", {"prompt": "a" * 1000}),
    (400, "max_tokens", "at least 1", {"max_tokens": 0}),
    (400, "temperature", "greater than or equal to 0", {"temperature": -1}),
    (400, "temperature", "valid number", {"temperature": "hot"}),
    (400, "top_p", "greater than 0", {"top_p": 0}),
    (400, "stop", "at most 16", {"stop": ["a"] * 17}),
    (400, "stop", "at least 1", {"stop": ""}),
    (400, "stop", "string", {"stop": [5]}),
    (400, "n", "less than or equal", {"n": 1000}),
    (400, "n", "at most 128 rows", {"n": 3, "prompt": ["a"] * 64}),
    (400, "logit_bias", "by token id", {"logit_bias": {"x": 1}}),
    (400, "logit_bias", "less than or equal to 100", {"logit_bias": {"5": 101}}),
    (400, "best_of", "as many as n=1", {"best_of": 2}),
    (400, "suffix", "Input should be ''", {"suffix": "end"}),
    (400, "stream", "of the prompt", {"stream": True, "echo": True, "logprobs": 1}),
    (400, "prompt", "none of them empty", {"prompt": []}),
    (400, "prompt", "token ids", {"prompt": [True]}),
    (400, "prompt", "token ids", {"prompt": [[1], ["a", 2]]}),
    (400, None, "surrogate", {"prompt": "\ud800"}),
    (400, None, "surrogate", {"stop": ["\udfff"]}),
    (413, None, "at most 200000 bytes", {"prompt": "a" * 200_000}),
    (429, None, "places of the queue", {"prompt": ["a"] * 29}),
]


def error_of(reply, status):
    """The error of an answer in OpenAI's form, and short."""
    assert reply.status_code == status and len(reply.content) < 4096, reply.text[:4096]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("status", "param", "message", "change"), REFUSED)
def test_refused(client, engine, status, param, message, change):
    good = ("POST", "/v1/completions", {"json": body("lora", 0)})
    bad = json.dumps(body("lora", 0, **change)).encode()
    reply, unharmed = client.all(
        ("POST", "/v1/completions", {"content": bad, "headers": {"content-type": "application/json"}}), good
    )
    error = error_of(reply, status)
    assert message in error["message"] and error["param"] == param, error
    assert error["code"] == ("model_not_found" if status == 404 else error["code"])
    assert unharmed.status_code == 200 and engine.waiting == 0


@pytest.mark.parametrize(
    ("param", "message", "change"),
    [
        ("messages", "at least 1", {"messages": []}),
        ("messages", "of type 'image_url'", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages", "expected content", {"messages": [{"role": "user"}]}),
        ("messages", "role", {"messages": [{"role": "bishop", "content": "x"}]}),
        ("messages", "function", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}),
        ("top_logprobs", "needs logprobs", {"top_logprobs": 2}),
        ("tool_choice", "among tools", {"tool_choice": "required"}),
        ("tools", "function", {"tools": [{"type": "retrieval"}]}),
        ("response_format", "json_schema", {"response_format": {"type": "json_schema"}}),
        ("max_completion_tokens", "greater than or equal to 1", {"max_completion_tokens": 0}),
    ],
)
def test_refused_chats(client, param, message, change):
    error = error_of(client.post("/v1/chat/completions", CHAT_BODY | change), 400)
    assert error["param"] == param and message in error["message"], error


WIDE = {
    "a list of wrong tokens": {"prompt": [1] * 90_000 + ["x"]},
    "wrong stop texts": {"stop": [5] * 90_000},
    "wrong token ids": {"stop_token_ids": ["5"] * 40_000},
    "wrong biases": {"logit_bias": {str(i): "x" for i in range(10_000)}},
    "unknown fields": {str(i): 1 for i in range(10_000)} | {"temperature": -1},
    "messages": {"messages": [{}] * 60_000},
    "parts": {"messages": [{"role": "user", "content": [1] * 90_000}]},
    "tools": {"tools": [{"a": 1}] * 20_000},
    "a long name": {"model": "x" * 190_000},
    "a long role": {"messages": [{"role": "x" * 190_000, "content": ""}]},
}


@pytest.mark.parametrize("kind", WIDE)
def test_a_wide_body_is_refused_at_its_first_fault(client, kind):
    start = time.process_time()
    for path, plain in (("/v1/completions", body("lora", 0)), ("/v1/chat/completions", CHAT_BODY)):
        content = json.dumps(plain | WIDE[kind], separators=(",", ":")).encode()
        assert len(content) < 200_000
        reply = client.post(path, content=content, headers={"content-type": "application/json"})
        if reply.status_code != 200:  # the field is none of this path's
            error_of(reply, 400)
    # The processor's seconds of this process: about 0.05; a second fault told would be 10.
    assert time.process_time() - start < 2


BROKEN = [
    b"{",
    b"",
    b"[]",
    b"3",
    b'{"prompt": NaN}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b"[" * 100_000,
    b'{"seed": ' + b"9" * 10_000 + b"}",
    b'{"temperature": 1e999, "prompt": "x"}',
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_broken_bodies(client, content):
    error_of(client.post("/v1/completions", content=content, headers={"content-type": "application/json"}), 400)


def test_only_json_is_read(client):
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = client.post("/v1/completions", content=json.dumps(body("lora", 0)).encode(), headers=headers)
        assert "content-type" in error_of(reply, 400)["message"]


def test_a_body_that_grows_too_large_as_it_comes(client):
    async def chunks():
        for _ in range(300):
            yield b" " * 1000

    error_of(client.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"}), 413)
    error_of(client.post("/v1/completions", content=b"x", headers={"content-length": "x"}), 413)


def test_strict_reading_refuses_unknown_fields(engine, root):
    strict = Client(create_app(engine, "tiny", root, strict=True))
    assert strict.post("/v1/completions", body("lora", 0, user="me", seed=None)).status_code == 200
    error = error_of(strict.post("/v1/completions", body("lora", 0, tempratur=1)), 400)
    assert error["param"] == "tempratur" and "no such field" in error["message"]
    message = {"role": "user", "content": "x", "colour": "red"}
    assert error_of(strict.post("/v1/chat/completions", {**CHAT, "messages": [message]}), 400)["param"] == "colour"


def test_paths_and_methods_that_are_not_there(client):
    error_of(client.get("/nowhere"), 404)
    error_of(client.get("/v1/models/nobody"), 404)
    for path, methods in (("/v1/adapters", "GET, POST"), ("/v1/completions", "POST"), ("/health", "GET")):
        (reply,) = client.all(("PATCH", path))
        error_of(reply, 405)
        assert reply.headers["allow"] == methods


def test_a_full_queue_takes_no_more(client, bank, engine):
    held = Held(bank.model)
    try:
        engine.max_queue = 0
        reply = client.post("/v1/completions", body("lora", 0))
        assert error_of(reply, 429)["type"] == "rate_limit_error" and reply.headers["retry-after"] == "1"
    finally:
        held.go.set()


def test_a_closed_engine_takes_nothing(client, engine):
    engine.close()
    error_of(client.post("/v1/completions", body("lora", 0)), 503)
    error_of(client.post("/v1/completions", body("lora", 0, stream=True)), 503)
    error_of(client.get("/health"), 503)


def test_an_engine_that_dies_fails_its_requests(client, engine, monkeypatch):
    def broken(*_):
        raise SystemError("out of order")

    monkeypatch.setattr(engine, "_admit", broken)
    seen = []
    engine.on_failure = seen.append
    error = error_of(client.post("/v1/completions", body("lora", 0)), 500)
    assert "out of order" in error["message"] and error["type"] == "server_error"
    error_of(client.post("/v1/completions", body("lora", 0)), 503)
    engine._thread.join()
    assert isinstance(seen[0], SystemError)


def test_a_row_that_fails_ends_its_stream_with_an_error(client, engine, monkeypatch):
    def broken(*_):
        raise ArithmeticError("no number")

    monkeypatch.setattr(engine, "_forward", broken)
    (event,) = client.stream("/v1/completions", body("lora", 0))
    assert event["error"]["type"] == "server_error" and "no number" in event["error"]["message"]
