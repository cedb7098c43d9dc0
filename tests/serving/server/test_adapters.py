"""Adapters that come and go while the server runs, their chat templates, and tokens."""

import json
import shutil

import pytest

from lowrank_kernels.serving.server import adapter_folder, load_all
from tests.serving.server.asking import CHAT, body, prompt_of
from tests.serving.tiny_model import make_tokenizer

NEW = {"name": "new", "folder": "team/more"}


@pytest.fixture
def new(client):
    """An adapter that was loaded while the server runs."""
    reply = client.post("/v1/adapters", NEW)
    assert reply.status_code == 201
    return reply


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
    assert client.get("/v1/models/new").json() == models[-1]
    assert (models[-1]["parent"], models[-1]["max_model_len"], models[0]["parent"]) == ("tiny", 64, None)


@pytest.mark.usefixtures("new")
def test_loading_under_a_name_again_replaces(client):
    assert client.post("/v1/adapters", NEW).status_code == 201
    models = client.get("/v1/models").json()["data"]
    assert [m["id"] for m in models].count("new") == 1


@pytest.mark.usefixtures("new")
def test_an_unloaded_adapter_answers_no_more(client):
    assert client.post("/v1/completions", body("new", 1)).status_code == 200
    assert 'lrk_generated_tokens_total{model="new"}' in client.get("/metrics").text
    assert client.all(("DELETE", "/v1/adapters/new"))[0].status_code == 204
    assert client.all(("DELETE", "/v1/adapters/new"))[0].status_code == 404
    assert client.post("/v1/completions", body("new", 1)).status_code == 404
    assert 'lrk_generated_tokens_total{model="new"}' not in client.get("/metrics").text


def test_loading_as_vllm_has_it(client, root, greedy):
    load = {"lora_name": "new", "lora_path": str(root / "team" / "more")}
    reply = client.post("/v1/load_lora_adapter", load)
    assert reply.status_code == 200 and reply.text == "Success: LoRA adapter 'new' added successfully."
    said = client.post("/v1/completions", body("new", 1)).json()
    assert said["choices"][0]["text"] == make_tokenizer().decode(greedy("rank 16", prompt_of(1), 4))
    assert client.post("/v1/load_lora_adapter", load).status_code == 400
    assert client.post("/v1/load_lora_adapter", load | {"load_inplace": True}).status_code == 200
    assert client.post("/v1/load_lora_adapter", load | {"lora_path": "/etc"}).status_code == 400
    for status in (200, 404):
        assert client.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == status
    assert client.post("/v1/unload_lora_adapter", {}).status_code == 400


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
        assert reply.status_code == 400, folder
    assert bank.names() == before
    assert adapter_folder(root, "team/more") == root / "team" / "more"
    for name in ("tiny", "", "a/b", "a b", 'a"b'):
        assert client.post("/v1/adapters", {"name": name, "folder": "lora"}).status_code == 400


def test_a_bad_adapter_is_told_without_the_servers_paths(client, bank, root):
    (root / "lora" / "adapter_model.safetensors").write_bytes(b"123")
    reply = client.post("/v1/adapters", {"name": "lora", "folder": "lora"})
    assert reply.status_code == 400 and "safetensors" in reply.text and str(root) not in reply.text
    assert client.post("/v1/completions", body("lora", 0)).status_code == 200  # the one there was


def test_load_all(engine, bank, root):
    shutil.copytree(root / "lora", root / "tiny")
    shutil.copytree(root / "lora", root / "bad")
    (root / "bad" / "adapter_config.json").write_text("{")
    bank.unload("lora")
    failed = load_all(engine, root, "tiny")
    assert set(failed) == {"tiny", "bad"} and "JSON" in failed["bad"] and "lora" in bank.names()


def test_one_adapters_own_folder_is_served_under_its_name(engine, bank, root):
    bank.unload("lora")
    assert load_all(engine, root / "lora", "tiny") == {} and "lora" in bank.names()


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
    assert reply.status_code == 400 and words in reply.text and file in reply.text and str(root) not in reply.text
    assert client.post("/v1/completions", body("lora", 0)).status_code == 200  # the one there was


def test_tokens_and_back(client):
    said = client.post("/tokenize", {"model": "lora", "prompt": "Hi", "return_token_strs": True}).json()
    ids = make_tokenizer()("Hi")["input_ids"]
    assert said == {"count": 2, "max_model_len": 64, "tokens": ids, "token_strs": ["H", "i"]}
    assert client.post("/detokenize", {"tokens": ids}).json() == {"prompt": "Hi"}
    assert client.post("/detokenize", {"tokens": [64]}).status_code == 400
    assert client.post("/tokenize", {"prompt": "Hi", "messages": CHAT["messages"]}).status_code == 400
    assert client.post("/tokenize", {"prompt": "Hi", "model": "nobody"}).status_code == 404
