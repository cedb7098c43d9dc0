"""An application over a tiny model, and what its adapters say."""

import shutil
import threading
from concurrent.futures import Future

import pytest
import torch
import uvicorn

from lowrank_kernels.serving import AdapterBank, Engine
from lowrank_kernels.serving.server import Safety, create_app
from tests.serving.server.asking import PATIENCE, Client
from tests.serving.tiny_model import make_model, make_tokenizer


@pytest.fixture
def bank(model, folders):
    with AdapterBank(model) as bank:
        for name in ("lora", "dora", "patterns", "bias", "rslora", "everywhere"):
            bank.load(name, folders[name])
        yield bank


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def engine(bank, tokenizer):
    engine = Engine(bank, tokenizer, max_rows=8, max_queue=20)
    yield engine
    engine.close(drain=False)


@pytest.fixture
def root(folders, tmp_path):
    shutil.copytree(folders["lora"], tmp_path / "adapters" / "lora")
    shutil.copytree(folders["rank 16"], tmp_path / "adapters" / "team" / "more")
    return tmp_path / "adapters"


@pytest.fixture
def app(engine, root):
    return create_app(engine, "tiny", root, safety=Safety(max_body_bytes=200_000))


@pytest.fixture
def client(app):
    return Client(app)


@pytest.fixture
def url(app):
    """The application behind a port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    port = Future()
    startup = server.startup

    async def startup_and_tell(sockets=None):
        await startup(sockets)
        port.set_result(server.servers[0].sockets[0].getsockname()[1])

    server.startup = startup_and_tell
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://localhost:{port.result(PATIENCE)}/v1"
    server.should_exit = True
    thread.join()


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
