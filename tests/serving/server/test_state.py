"""The file that notes which adapters are loaded: a server that was killed comes back with them."""

import json

import pytest

from lowrank_kernels.serving import AdapterBank, Engine
from lowrank_kernels.serving.server import State, create_app
from tests.serving.server.asking import Client
from tests.serving.tiny_model import make_model, make_tokenizer

NEW = {"name": "new", "folder": "team/more", "pin": True}


@pytest.fixture
def started(root, tmp_path):
    """Starts a server over a new model with the state of ``tmp_path``: client, bank, what was not loaded."""
    engines, banks = [], []

    def start():
        state = State(tmp_path / "state.json")
        banks.append(AdapterBank(make_model()))
        engines.append(Engine(banks[-1].__enter__(), make_tokenizer()))
        failed = state.load(engines[-1], root, "tiny")
        return Client(create_app(engines[-1], "tiny", root, state=state)), banks[-1], failed

    yield start
    for engine, bank in zip(engines, banks, strict=True):
        engine.close(drain=False)
        bank.__exit__(None, None, None)


def test_what_was_loaded_is_loaded_again(started, root, tmp_path):
    client, bank, failed = started()
    assert bank.names() == ["lora"] and failed == {}  # all that the folder has
    assert client.post("/v1/adapters", NEW).status_code == 201
    assert client.post("/v1/adapters", {"name": "bad", "folder": "nowhere"}).status_code == 400
    assert client.all(("DELETE", "/v1/adapters/lora"))[0].status_code == 204
    noted = {"new": {"folder": "team/more", "pin": True}}
    assert json.loads((tmp_path / "state.json").read_text()) == {"adapters": noted}
    client, bank, failed = started()  # nothing of the first one was closed
    assert bank.names() == ["new"] and failed == {}
    assert client.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 200
    load = {"lora_name": "again", "lora_path": str(root / "lora")}
    assert client.post("/v1/load_lora_adapter", load).status_code == 200
    (root / "lora" / "adapter_model.safetensors").write_bytes(b"123")
    _, bank, failed = started()
    assert bank.names() == [] and "safetensors" in failed["again"]
    assert list(State(tmp_path / "state.json").adapters) == ["again"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"adapters": {"a": {}}}', '{"adapters": [1]}'])
def test_a_file_that_is_no_state_is_refused(content, tmp_path):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"--state: expected .* that lrk serve wrote"):
        State(tmp_path / "state.json")
    assert (tmp_path / "state.json").read_text() == content
