"""Who may ask: hosts, origins, keys; and clients that are slow or go away."""

import asyncio

import httpx
import pytest

from lowrank_kernels.serving.server import Safety, create_app
from lowrank_kernels.serving.server import service as of_service
from tests.serving.server.asking import PATIENCE, Client, Held, body


def made(engine, root, **safety):
    return Client(create_app(engine, "tiny", root, safety=Safety(**safety)))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("localhost.", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:8000", 200),
        ("192.168.7.7", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:localhost", 403),
        ("evil@localhost", 200),  # what stands before the @ is no part of a name
        ("[::1", 403),
        ("", 403),
    ],
)
def test_requests_for_other_hosts_are_refused(client, host, status):
    reply = client.get("/health", headers={"host": host})
    assert reply.status_code == status, reply.text


def test_hosts_that_are_allowed(engine, root):
    client = made(engine, root, hosts=["models.example"])
    assert client.get("/health", headers={"host": "Models.Example:443"}).status_code == 200
    assert client.get("/health", headers={"host": "localhost"}).status_code == 403
    client = made(engine, root, hosts=["*"])
    assert client.get("/health", headers={"host": "any.example"}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        ("https://localhost", 200),  # a proxy before the server speaks TLS
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_pages_of_other_sites_are_refused(client, origin, status):
    reply = client.post("/v1/completions", body("lora", 0), headers={"origin": origin})
    assert reply.status_code == status, reply.text
    assert "access-control-allow-origin" not in reply.headers


def test_pages_that_are_allowed_may_read_the_answer(engine, root):
    client = made(engine, root, origins=["https://app.example"], keys=["secret"])
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    (preflight,) = client.all(("OPTIONS", "/v1/completions", {"headers": asks}))
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    headers = {"origin": "https://app.example", "authorization": "Bearer secret"}
    reply = client.post("/v1/completions", body("lora", 0), headers=headers)
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://app.example"
    assert client.get("/v1/models", headers=headers | {"origin": "https://evil.example"}).status_code == 403


def test_keys(engine, root):
    client = made(engine, root, keys=["first", "second"])
    for key in ("first", "second"):
        assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    for said in (
        "Bearer third",
        "Bearer ",
        "Bearer firs",
        "Basic first",
        "first",
        "Bearer first second",
        "Bearer \xff",
    ):
        reply = client.get("/v1/models", headers={"authorization": said.encode("latin-1")})
        assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", said
        assert reply.json()["error"]["code"] == "invalid_api_key"
    for path in ("/metrics", "/openapi.json", "/v1/adapters", "/nowhere"):
        assert client.get(path).status_code == 401
    for path in ("/health", "/ping", "/"):
        assert client.get(path).status_code == 200


def ask(app, content, *, then):
    """Send a request, ``await then(task)`` while it is answered, and say that the client is gone; what was sent."""

    async def go():
        gone, sent = asyncio.Event(), []
        parts = iter([{"type": "http.request", "body": content, "more_body": content == b""}])

        async def receive():
            if (message := next(parts, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("t", 80),
            "client": ("t", 1),
            "root_path": "",
        }
        task = asyncio.create_task(app(scope, receive, send))
        await then(task)
        gone.set()
        await asyncio.wait_for(task, PATIENCE)
        return sent

    return asyncio.run(go())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_rows(app, engine, bank, stream):
    held = Held(bank.model)
    content = httpx.Request("POST", "http://t", json=body("lora", 0, max_tokens=50, n=2, stream=stream)).content

    async def until_it_runs(_):
        assert await asyncio.to_thread(held.entered.wait, PATIENCE)

    ask(app, content, then=until_it_runs)
    assert all(row.job.future.cancelled() for row in engine._rows) and engine.running == 2
    held.go.set()
    metrics = Client(app).get("/metrics").text
    assert "lrk_cancelled_total 2" in metrics
    engine.close()
    assert engine.counts["generated_tokens"] == 2  # of the step that ran then


def test_a_body_that_does_not_come(engine, root):
    app = create_app(engine, "tiny", root, safety=Safety(body_seconds=0.01))

    async def until_it_ends(task):
        await asyncio.wait([task])

    start, said = ask(app, b"", then=until_it_ends)
    assert start["status"] == 408 and b"0.01 seconds" in said["body"]


def test_a_stream_in_which_nothing_comes_says_that_it_is_there(app, bank, monkeypatch):
    monkeypatch.setattr(of_service, "KEEP_ALIVE_SECONDS", 0.01)
    held = Held(bank.model)
    content = httpx.Request("POST", "http://t", json=body("lora", 0, stream=True)).content

    async def a_while(_):
        await asyncio.to_thread(held.entered.wait, PATIENCE)
        await asyncio.sleep(0.1)
        held.go.set()
        await asyncio.wait([_])

    sent = ask(app, content, then=a_while)
    said = b"".join(message.get("body", b"") for message in sent)
    assert said.startswith(b": still here\n\n") and said.endswith(b"data: [DONE]\n\n")


def test_a_stream_that_outlives_the_grace_ends_with_an_error(app, bank):
    held = Held(bank.model)
    content = httpx.Request("POST", "http://t", json=body("lora", 0, stream=True)).content

    async def time_is_up(task):
        await asyncio.to_thread(held.entered.wait, PATIENCE)
        task.cancel()
        await asyncio.wait([task])
        held.go.set()

    sent = ask(app, content, then=time_is_up)
    said = b"".join(message.get("body", b"") for message in sent)
    assert b"shutting down" in said and said.endswith(b"data: [DONE]\n\n") and not sent[-1]["more_body"]


def test_every_status_is_documented(client):
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            codes = set(operation["responses"])
            assert {"401", "403", "408", "413", "500"} < codes and "422" not in codes, path
            if method == "post" and path not in ("/ping",):
                (schema,) = (operation["requestBody"]["content"]["application/json"]["schema"],)
                assert schema["$ref"].split("/")[-1] in document["components"]["schemas"]
    assert set(document["paths"]["/v1/chat/completions"]["post"]["responses"]) > {"400", "404", "429", "503"}
