"""The HTTP server: each row its adapter's, limits, cancelling, loading and unloading, failing closed."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import httpx
import pytest
import torch

from lowrank_kernels.serving import AdapterBank
from lowrank_kernels.serving.batcher import Batcher, Closed, Generation, QueueFull, _Rows
from lowrank_kernels.serving.server import adapter_folder, create_app, load_all
from tests.serving.tiny_model import make_model, make_tokenizer

PATIENCE = 60.0
"""Seconds until a test gives up what never comes; nothing waits so long otherwise."""
NAMES = ["lora", None, "dora", "patterns", "bias", None, "rslora", "everywhere"]


@pytest.fixture
def bank(model, folders):
    with AdapterBank(model) as bank:
        for name in ("lora", "dora", "patterns", "bias", "rslora", "everywhere"):
            bank.load(name, folders[name])
        yield bank


@pytest.fixture
def batcher(bank):
    batcher = Batcher(bank, make_tokenizer(), max_batch=8, wait_seconds=0.1, max_queue=20)
    yield batcher
    batcher.close(drain=False)


@pytest.fixture
def root(folders, tmp_path):
    shutil.copytree(folders["lora"], tmp_path / "adapters" / "lora")
    shutil.copytree(folders["rank 16"], tmp_path / "adapters" / "team" / "more")
    return tmp_path / "adapters"


class Client:
    """Requests in one process, each awaited or all at once."""

    def __init__(self, app):
        self.transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def all(self, *requests):
        async def send():
            async with httpx.AsyncClient(transport=self.transport, base_url="http://test", timeout=30) as client:
                return await asyncio.gather(*(client.request(*r[:2], **(r[2] if r[2:] else {})) for r in requests))

        return asyncio.run(send())

    def get(self, path):
        return self.all(("GET", path))[0]

    def post(self, path, body=None, **options):
        return self.all(("POST", path, {"json": body} if body is not None else options))[0]


@pytest.fixture
def client(batcher, root):
    return Client(create_app(batcher, "tiny", root, max_body_bytes=5000))


@pytest.fixture(scope="module")
def greedy(alone):
    """What PEFT's own model continues a prompt with, by itself."""

    @torch.no_grad()
    def tokens(name, prompt, count):
        ids = torch.tensor([prompt])
        alone(name, ids)  # makes the model
        one = make_model() if name is None else alone.models[name]
        return one.generate(input_ids=ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()

    return tokens


def prompt_of(row):
    return [(7 * i + 3 * row) % 62 + 1 for i in range(3 + row)]


def body(name, row, **options):
    return {"model": name or "tiny", "prompt": prompt_of(row), "max_tokens": 3 + row, "temperature": 0, **options}


# --------------------------------------------------------------------------------------------------------- answers


def test_requests_for_different_adapters_run_as_one_batch_and_each_is_its_own(client, batcher, greedy):
    batcher.wait_seconds = PATIENCE  # the batch starts when it is full, not when a time is up
    assert batcher.max_batch == len(NAMES)
    replies = client.all(*(("POST", "/v1/completions", {"json": body(n, i)}) for i, n in enumerate(NAMES)))
    tokenizer = make_tokenizer()
    for row, (name, reply) in enumerate(zip(NAMES, replies, strict=True)):
        assert reply.status_code == 200, reply.text
        said = reply.json()
        expected = tokenizer.decode(greedy(name, prompt_of(row), 3 + row), skip_special_tokens=True)
        assert said["choices"][0]["text"] == expected, name
        assert said["choices"][0]["finish_reason"] == "length" and said["model"] == (name or "tiny")
        assert said["usage"] == {
            "prompt_tokens": 3 + row,
            "completion_tokens": 3 + row,
            "total_tokens": 6 + 2 * row,
        }
    assert batcher.batches == 1 and batcher.rows == len(NAMES)


def test_several_prompts_of_one_request(client, greedy):
    tokenizer = make_tokenizer()
    said = client.post("/v1/completions", body("dora", 0, prompt=["Hello there", "bye"])).json()
    for choice, text in zip(said["choices"], ("Hello there", "bye"), strict=True):
        assert choice["text"] == tokenizer.decode(greedy("dora", tokenizer(text)["input_ids"], 3))


def test_chat(client, greedy):
    tokenizer = make_tokenizer()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    asked = {"model": "lora", "messages": messages, "max_completion_tokens": 5, "temperature": 0}
    reply = client.post("/v1/chat/completions", asked)
    expected = greedy("lora", tokenizer("system:Be kind.|user:Who?|")["input_ids"], 5)
    assert reply.json()["choices"][0]["message"] == {"role": "assistant", "content": tokenizer.decode(expected)}
    assert reply.json()["object"] == "chat.completion"
    assert client.post("/v1/chat/completions", {**asked, "messages": []}).status_code == 422


NEUTRAL = {
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logprobs": None,
    "echo": False,
    "best_of": 1,
    "suffix": None,
    "logit_bias": {},
    "seed": None,
    "stop": None,
    "user": None,
    "top_p": 1,
    "stream_options": None,
    "temperature": 0,
}


def test_what_asks_for_nothing_is_taken(client):
    """As clients send it: null, and each setting's own neutral value."""
    for model in ("lora", "tiny"):
        plain = client.post("/v1/completions", body(model, 1)).json()
        asked = client.post("/v1/completions", body(model, 1, **NEUTRAL)).json()
        assert asked["choices"] == plain["choices"]
    everything = {"max_tokens": None, "temperature": None, "n": None, "stream": None}
    assert client.post("/v1/completions", body("lora", 1, **everything)).status_code == 200


def test_messages_as_clients_send_them(client):
    plain = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Who?"},
    ]
    sent = [
        {"role": "developer", "content": "Be kind.", "name": None},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "audio": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]},
    ]
    options = {"model": "lora", "temperature": 0, "max_tokens": 5}
    of_chat = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False}
    replies = [
        client.post("/v1/chat/completions", {**options, **more, "messages": messages})
        for messages, more in ((plain, {}), (sent, of_chat))
    ]
    assert replies[1].json()["choices"] == replies[0].json()["choices"]
    for message, said in (
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "type"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}, "more"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "tool", "content": "x"}, "role"),
    ):
        refused = client.post("/v1/chat/completions", {**options, "messages": [message]})
        assert refused.status_code == 422 and said in refused.text


def test_stop(client, greedy):
    whole = make_tokenizer().decode(greedy("lora", prompt_of(2), 12))
    stop = whole[4:6]
    said = client.post("/v1/completions", body("lora", 2, max_tokens=12, stop=[stop, "\n\n\n\n"])).json()
    assert said["choices"][0]["text"] == whole[: whole.index(stop)]
    assert said["choices"][0]["finish_reason"] == "stop"


def test_end_of_text_ends_a_row_alone(bank, greedy):
    tokenizer = make_tokenizer()
    whole = greedy("lora", prompt_of(1), 8)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(whole[3])
    batcher = Batcher(bank, tokenizer, wait_seconds=0.1)
    jobs = [Generation("lora", prompt_of(1), 8), Generation(None, prompt_of(1), 8)]
    batcher.submit(jobs)
    first, other = (job.future.result(30) for job in jobs)
    batcher.close()
    assert first.tokens == whole[: whole.index(whole[3])] and first.finish_reason == "stop"
    base = greedy(None, prompt_of(1), 8)
    assert other.tokens == (base[: base.index(whole[3])] if whole[3] in base else base)


def test_draws_are_the_seeds_alone_and_follow_the_softmax(batcher, alone):
    def draw(*jobs):
        batcher.submit(jobs)
        return [job.future.result(60).tokens for job in jobs]

    def job(seed, name="lora", count=6, **options):
        return Generation(name, prompt_of(1), count, temperature=0.7, seed=seed, **options)

    (by_itself,) = draw(job(5))
    mixed = draw(job(6), job(5), job(5, "dora"), Generation(None, prompt_of(4), 9))
    assert mixed[1] == by_itself and mixed[0] != by_itself
    (only,) = draw(job(9, top_p=1e-6))
    (greedy,) = draw(Generation("lora", prompt_of(1), 6))
    assert only == greedy

    share = (alone("lora", torch.tensor([prompt_of(1)]))[0, -1] / 0.7).softmax(0)
    batcher.max_batch, count = 400, 400
    batcher.max_queue = 400
    first = torch.tensor(draw(*(job(seed, count=1) for seed in range(count)))).flatten()
    seen = torch.bincount(first, minlength=64) / count
    assert float((seen - share).abs().sum() / 2) < 0.2  # total variation; a wrong temperature is beyond it
    wrong = (alone("lora", torch.tensor([prompt_of(1)]))[0, -1] / 7).softmax(0)
    assert float((seen - wrong).abs().sum() / 2) > 0.25


# --------------------------------------------------------------------------------------------- what is refused, and how

REFUSED = [
    (404, "there is no model 'nobody'", {"model": "nobody"}),
    (422, "expected prompt and completion within 64 tokens", {"max_tokens": 62}),
    (422, "expected token ids from 0 to 63", {"prompt": [3, 64]}),
    (422, "expected token ids from 0 to 63", {"prompt": [-1]}),
    (422, "expected a prompt of at least one token", {"prompt": ""}),
    (422, "max_tokens", {"max_tokens": 0}),
    (422, "temperature", {"temperature": -1}),
    (422, "temperature", {"temperature": "hot"}),
    (422, "top_p", {"top_p": 0}),
    (422, "stop", {"stop": ["a"] * 5}),
    (422, "stop", {"stop": ""}),
    (422, "stream", {"stream": True}),
    (422, "n: ", {"n": 2}),
    (422, "logit_bias: Extra inputs", {"logit_bias": {"5": 1}}),
    (422, "presence_penalty: Extra inputs", {"presence_penalty": 0.5}),
    (422, "echo: Extra inputs", {"echo": True}),
    (422, "best_of: Extra inputs", {"best_of": 2}),
    (422, "logprobs: Extra inputs", {"logprobs": 0}),
    (422, "prompt", {"prompt": []}),
    (422, "prompt", {"prompt": [True]}),
    (413, "at most 5000 bytes", {"prompt": "a" * 6000}),
    (429, "places of the queue", {"prompt": ["a"] * 21}),
]


@pytest.mark.parametrize(("status", "message", "change"), REFUSED)
def test_refused(client, batcher, status, message, change):
    good = ("POST", "/v1/completions", {"json": body("lora", 0)})
    bad = ("POST", "/v1/completions", {"json": body("lora", 0, **change)})
    reply, unharmed = client.all(bad, good)
    assert reply.status_code == status and message in reply.json()["error"]["message"], reply.text
    assert unharmed.status_code == 200
    assert batcher.waiting == 0


def test_broken_bodies(client):
    assert client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 422

    async def chunks():
        for _ in range(100):
            yield b" " * 100

    reply = client.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert client.post("/v1/completions", content=b"x", headers={"content-length": "x"}).status_code in (400, 413)
    assert client.get("/nowhere").json()["error"]["code"] == 404


def test_what_is_wrong_with_one_row_is_told_to_that_one_alone(batcher, bank, greedy, monkeypatch):
    jobs = [Generation(name, prompt_of(row), 4) for row, name in enumerate(["lora", "dora", None, "gone"])]
    batcher.submit(jobs)
    for job in jobs[:3]:
        assert job.future.result(30).tokens == greedy(job.adapter, job.prompt, 4)
    with pytest.raises(ValueError, match="expected the name of an adapter, got 'gone'"):
        jobs[3].future.result(30)


def test_adapters_that_do_not_fit_the_budget_together_take_turns(model, folders, greedy):
    with AdapterBank(model) as bank:
        bank.load("dora", folders["dora"])
        bank.budget_bytes = bank.nbytes
        bank.load("again", folders["dora"])
        batcher = Batcher(bank, make_tokenizer(), wait_seconds=0.1)
        jobs = [Generation(name, prompt_of(2), 4) for name in ("dora", "again", "dora", None)]
        batcher.submit(jobs)
        for job in jobs:
            name = None if job.adapter is None else "dora"
            assert job.future.result(30).tokens == greedy(name, prompt_of(2), 4)
        batcher.close()


def test_a_batch_keeps_to_the_length_that_the_model_has(batcher, greedy):
    """A long prompt and a long completion do not run together: padded, they would be beyond the model's positions."""
    jobs = [Generation("lora", [5] * 50, 4), Generation("dora", [7], 60), Generation(None, [5] * 40, 5)]
    batcher.submit(jobs)
    for job in jobs:
        assert job.future.result(60).tokens == greedy(job.adapter, job.prompt, job.max_tokens)
    assert batcher.batches == 2


# --------------------------------------------------------------------------------------------- cancelling, closing


class Held:
    """Holds the model's forward, so that a batch runs for as long as a test wants."""

    def __init__(self, model):
        self.entered, self.go = threading.Event(), threading.Event()
        self.steps = 0
        self.hook = model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.entered.set()
        assert self.go.wait(PATIENCE)
        self.steps += 1

    def go_when_closing(self, batcher, monkeypatch):
        """Let go once ``batcher.close()`` has told the batcher's thread to end, and waits for that."""
        join = batcher._thread.join
        monkeypatch.setattr(batcher._thread, "join", lambda: (self.go.set(), join()))


def test_cancelled_rows_end_and_others_go_on(batcher, bank, greedy):
    held = Held(bank.model)
    jobs = [Generation("lora", prompt_of(0), 40), Generation("dora", prompt_of(1), 5)]
    batcher.submit(jobs)
    assert held.entered.wait(PATIENCE)
    queued = Generation("lora", prompt_of(0), 40)
    batcher.submit([queued])
    assert jobs[0].future.cancel() and queued.future.cancel()
    held.go.set()
    assert jobs[1].future.result(30).tokens == greedy("dora", prompt_of(1), 5)
    last = Generation("bias", prompt_of(2), 2)
    batcher.submit([last])
    assert last.future.result(30).tokens == greedy("bias", prompt_of(2), 2)
    assert held.steps == 5 + 2 and batcher.rows == 3  # neither the cancelled row's 40 steps nor the queued one's


def test_a_client_that_goes_cancels_its_rows(batcher, bank, root):
    app = create_app(batcher, "tiny", root)
    held = Held(bank.model)

    async def go_away():
        gone = asyncio.Event()
        sent = iter([{"type": "http.request", "body": httpx.Request("POST", "http://t", json=body("lora", 0)).content}])

        async def receive():
            if (message := next(sent, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_):
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("t", 80),
            "client": ("t", 1),
            "root_path": "",
        }
        task = asyncio.create_task(app(scope, receive, send))
        assert await asyncio.to_thread(held.entered.wait, PATIENCE)
        gone.set()
        await asyncio.wait_for(task, PATIENCE)

    asyncio.run(go_away())
    assert all(job.future.cancelled() for job in batcher._batch)
    held.go.set()
    assert "lrk_cancelled_total 1" in Client(app).get("/metrics").text


@pytest.fixture
def held_and_full(batcher, bank):
    """One generation that is held while it runs, and as many behind it as may wait."""
    held = Held(bank.model)
    running = Generation(None, [3], 2)
    batcher.submit([running])
    assert held.entered.wait(PATIENCE)
    waiting = [Generation("lora", [3], 2) for _ in range(batcher.max_queue)]
    batcher.submit(waiting)
    yield held, [running, *waiting]
    held.go.set()


def test_a_full_queue_takes_no_more(held_and_full, batcher, client):
    with pytest.raises(QueueFull):
        batcher.submit([Generation(None, [3], 1)])
    reply = client.post("/v1/completions", body("lora", 0))
    assert reply.status_code == 429 and reply.headers["retry-after"] == "1"


def test_closing_finishes_what_waits(held_and_full, batcher, monkeypatch):
    held, jobs = held_and_full
    held.go_when_closing(batcher, monkeypatch)
    batcher.close()
    assert all(len(job.future.result(0).tokens) == 2 for job in jobs)


def test_a_closed_batcher_takes_nothing(batcher, client):
    batcher.close()
    with pytest.raises(Closed):
        batcher.submit([Generation(None, [3], 1)])
    assert client.post("/v1/completions", body("lora", 0)).status_code == 503
    assert client.get("/health").status_code == 503


def test_closing_at_once_cancels(batcher, bank, monkeypatch):
    held = Held(bank.model)
    jobs = [Generation(None, [3], 50) for _ in range(12)]
    batcher.submit(jobs)
    assert held.entered.wait(PATIENCE)
    held.go_when_closing(batcher, monkeypatch)
    batcher.close(drain=False)
    for job in jobs:
        with pytest.raises(CancelledError):
            job.future.result(0)
    assert held.steps == 1


def test_bad_limits(bank):
    for options in ({"max_batch": 0}, {"max_queue": 0}, {"max_length": 65}, {"wait_seconds": -1}):
        with pytest.raises(ValueError, match=f"Batcher: expected {next(iter(options))}"):
            Batcher(bank, make_tokenizer(), **options)


# ----------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def new(client):
    """An adapter that was loaded while the server runs."""
    reply = client.post("/v1/adapters", NEW)
    assert reply.status_code == 201
    return reply


NEW = {"name": "new", "folder": "team/more"}


def test_an_adapter_that_is_not_loaded_is_not_found(client):
    assert client.post("/v1/completions", body("new", 1)).status_code == 404
    assert client.all(("DELETE", "/v1/adapters/new"))[0].status_code == 404


@pytest.mark.usefixtures("new")
def test_a_loaded_adapter_answers(client, greedy):
    said = client.post("/v1/completions", body("new", 1)).json()
    assert said["choices"][0]["text"] == make_tokenizer().decode(greedy("rank 16", prompt_of(1), 4))


@pytest.mark.usefixtures("new")
def test_a_loaded_adapter_is_listed(client):
    models = client.get("/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["tiny", "lora", "dora", "patterns", "bias", "rslora", "everywhere", "new"]
    assert {"name": "new", "resident": True} in client.get("/v1/adapters").json()["adapters"]


@pytest.mark.usefixtures("new")
def test_loading_under_a_name_again_replaces(client):
    assert client.post("/v1/adapters", NEW).status_code == 201
    models = client.get("/v1/models").json()["data"]
    assert [m["id"] for m in models].count("new") == 1


@pytest.mark.usefixtures("new")
def test_an_unloaded_adapter_answers_no_more(client):
    assert client.all(("DELETE", "/v1/adapters/new"))[0].status_code == 204
    assert client.all(("DELETE", "/v1/adapters/new"))[0].status_code == 404
    assert client.post("/v1/completions", body("new", 1)).status_code == 404


def test_only_folders_below_the_root_are_loaded(client, bank, root, folders, tmp_path):
    (root / "out").symlink_to(folders["lora"])
    shutil.copytree(folders["lora"], tmp_path / "adapters2")
    tricks = [
        "..",
        ".",
        "../adapters2",
        "team/../../adapters2",
        str(folders["lora"]),
        "out",
        "/",
        "a\0b",
        "nowhere",
        "x" * 400,
    ]
    before = bank.names()
    for folder in tricks:
        with pytest.raises(ValueError, match="expected the name of a folder below"):
            adapter_folder(root, folder)
        reply = client.post("/v1/adapters", {"name": "x", "folder": folder})
        assert reply.status_code == 422, folder
    assert bank.names() == before
    assert adapter_folder(root, "team/more") == root / "team" / "more"
    for name in ("tiny", "", "a/b", "a b", 'a"b'):
        assert client.post("/v1/adapters", {"name": name, "folder": "lora"}).status_code == 422


def test_a_bad_adapter_is_told_without_the_servers_paths(client, bank, root):
    (root / "lora" / "adapter_model.safetensors").write_bytes(b"123")
    reply = client.post("/v1/adapters", {"name": "lora", "folder": "lora"})
    assert reply.status_code == 422 and "safetensors" in reply.text and str(root) not in reply.text
    assert client.post("/v1/completions", body("lora", 0)).status_code == 200  # the one there was


def test_load_all(batcher, bank, root):
    shutil.copytree(root / "lora", root / "tiny")
    shutil.copytree(root / "lora", root / "bad")
    (root / "bad" / "adapter_config.json").write_text("{")
    bank.unload("lora")
    failed = load_all(batcher, root, "tiny")
    assert set(failed) == {"tiny", "bad"} and "JSON" in failed["bad"] and "lora" in bank.names()


def test_one_adapters_own_folder_is_served_under_its_name(batcher, bank, root):
    bank.unload("lora")
    assert load_all(batcher, root / "lora", "tiny") == {} and "lora" in bank.names()


CHAT = {"messages": [{"role": "user", "content": "Who?"}], "max_completion_tokens": 5, "temperature": 0}


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "several in tokenizer_config.json"])
def test_an_adapters_own_chat_template_renders_its_messages(client, root, greedy, file):
    template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    if file.endswith(".jinja"):
        (root / "lora" / file).write_text(template)
    else:
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        written = {"chat_template": several if "several" in file else template}
        (root / "lora" / "tokenizer_config.json").write_text(json.dumps(written))
    tokenizer = make_tokenizer()

    def said(model, rendered, adapter):
        reply = client.post("/v1/chat/completions", {"model": model, **CHAT})
        expected = tokenizer.decode(greedy(adapter, tokenizer(rendered)["input_ids"], 5))
        assert reply.json()["choices"][0]["message"]["content"] == expected

    said("lora", "user:Who?|", "lora")  # loaded before it had one
    assert client.post("/v1/adapters", {"name": "lora", "folder": "lora"}).json() == {"name": "lora"}
    said("lora", "Who?!", "lora")
    said("rslora", "user:Who?|", "rslora")
    client.all(("DELETE", "/v1/adapters/lora"))
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (root / "lora" / file).unlink(missing_ok=True)
    client.post("/v1/adapters", {"name": "lora", "folder": "lora"})
    said("lora", "user:Who?|", "lora")


def test_a_tokenizer_of_other_tokens_is_said_not_to_be_used(client, root, caplog):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(root / "lora")
    assert client.post("/v1/adapters", {"name": "lora", "folder": "lora"}).json() == {"name": "lora"}
    tokenizer.add_tokens(["<tool>", "<end>"])
    tokenizer.save_pretrained(root / "lora")
    note = "its tokenizer has 2 tokens that differ from the model's; the model's is used"
    assert client.post("/v1/adapters", {"name": "lora", "folder": "lora"}).json() == {"name": "lora", "note": note}
    assert f"adapter lora: {note}" in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("chat_template.jinja", b"\xff\xfe", "UTF-8"),
        ("chat_template.jinja", b" " * (2 << 20), "at most"),
        ("tokenizer_config.json", b"[1]", "JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "to be text"),
        ("tokenizer.json", b"{", "JSON"),
        ("tokenizer.json", b'{"model": {"vocab": 3}}', "vocabulary"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_refused(client, root, file, content, words):
    (root / "lora" / file).write_bytes(content)
    reply = client.post("/v1/adapters", {"name": "lora", "folder": "lora"})
    assert reply.status_code == 422 and words in reply.text and file in reply.text and str(root) not in reply.text
    assert client.post("/v1/completions", body("lora", 0)).status_code == 200  # the one there was


def test_metrics(client):
    client.post("/v1/completions", body("lora", 1))
    client.post("/v1/completions", body("nobody", 1))
    assert client.get("/health").json() == {"status": "ok"}
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'lrk_requests_total{status="200"} 1',
        'lrk_requests_total{status="404"} 1',
        "lrk_prompt_tokens_total 4",
        "lrk_generated_tokens_total 4",
        "lrk_batches_total 1",
        "lrk_batch_rows_total 1",
        "lrk_waiting_rows 0",
        "lrk_adapters 6",
        "# TYPE lrk_requests_total counter",
        "# TYPE lrk_adapters gauge",
    ):
        assert line in lines, line


# -------------------------------------------------------------------------------------------------------- the command


SERVE = """
import sys
import uvicorn
from lowrank_kernels.cli import main

startup = uvicorn.Server.startup

async def startup_and_say(server, *args, **options):
    await startup(server, *args, **options)
    print("listening on", server.servers[0].sockets[0].getsockname()[1], file=sys.stderr, flush=True)

uvicorn.Server.startup = startup_and_say
sys.exit(main())
"""


def test_the_command_serves_and_ends_at_a_signal(root, tmp_path, greedy):
    make_model().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    arguments = ["serve", "--model", str(tmp_path / "tiny"), "--adapters", str(root), "--port", "0"]
    process = subprocess.Popen([sys.executable, "-c", SERVE, *arguments], stderr=subprocess.PIPE, text=True)
    hung = threading.Timer(5 * PATIENCE, process.kill)
    hung.start()
    try:
        said = [process.stderr.readline()]
        while said[-1] and not said[-1].startswith("listening on"):
            said.append(process.stderr.readline())
        assert said[-1], "".join(said)  # it ended before it listened
        url = f"http://127.0.0.1:{said[-1].split()[-1]}"
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        reply = httpx.post(f"{url}/v1/completions", json=body("lora", 1), timeout=PATIENCE).json()
        assert reply["choices"][0]["text"] == make_tokenizer().decode(greedy("lora", prompt_of(1), 4))
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=PATIENCE)
        errors = "".join(said) + process.stderr.read()
    finally:
        hung.cancel()
        process.kill()
    assert "tiny with 1 adapters" in errors and "Traceback" not in errors, errors


def test_a_stop_text_that_is_a_special_token_ends_a_row():
    """Decoding leaves special tokens out, so that no text shows it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["|"]})
    (mark,) = tokenizer.convert_tokens_to_ids(["|"])
    job = Generation(None, [5, 6], 8, stop=("|",))
    rows = _Rows([job], 2, tokenizer, frozenset())
    assert rows.done(torch.tensor([[5, 6, 7]]), None).tolist() == [False]
    assert rows.done(torch.tensor([[5, 6, 7, mark]]), None).tolist() == [True]
    assert (job.future.result().tokens, job.future.result().finish_reason) == ([7, mark], "stop")
