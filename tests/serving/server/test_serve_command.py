"""`lrk serve` as a process: it says where it listens, answers, and ends as it should."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lowrank_kernels.cli import arguments, main
from lowrank_kernels.serving import Engine
from tests.serving.server.asking import PATIENCE, body, prompt_of
from tests.serving.tiny_model import make_model, make_tokenizer

COMMAND = [sys.executable, "-c", "import sys; from lowrank_kernels.cli import main; sys.exit(main())", "serve"]


class Process:
    """`lrk serve` over a tiny model; what it says on stderr, line by line."""

    def __init__(self, folder, root, *options, **environment):
        command = [*COMMAND, "--model", str(folder), "--adapters", str(root), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self.hung = threading.Timer(5 * PATIENCE, self.process.kill)
        self.hung.start()
        self.said = []
        while not self.said or not self.said[-1].startswith("listening on http://127.0.0.1:"):
            self.said.append(self.process.stderr.readline())
            assert self.said[-1], "".join(self.said)  # it ended before it listened
        self.port = int(self.said[-1].rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def end(self):
        """Ask it to end; its exit code and all that it said."""
        self.process.send_signal(signal.SIGTERM)
        rest = self.process.stderr.read()
        return self.process.wait(PATIENCE), "".join(self.said) + rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"


def connected(port, text):
    """A connection that has sent this much."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.sendall(text.encode())
    return connection


@pytest.fixture
def process(folder, root):
    process = Process(folder, root, "--grace", "30", "--head-seconds", "60", LRK_API_KEY="secret")
    yield process
    process.hung.cancel()
    process.process.kill()


def test_it_answers_and_ends_at_a_signal_with_half_a_request_there(process, folder, greedy):
    headers = {"authorization": "Bearer secret"}
    assert httpx.get(f"{process.url}/health", timeout=PATIENCE).status_code == 200
    assert httpx.get(f"{process.url}/v1/models", timeout=PATIENCE).status_code == 401
    reply = httpx.post(f"{process.url}/v1/completions", json=body("lora", 1), headers=headers, timeout=PATIENCE)
    assert reply.json()["choices"][0]["text"] == make_tokenizer().decode(greedy("lora", prompt_of(1), 4))
    with connected(process.port, HEAD[:40]), connected(process.port, HEAD + "Authorization: Bearer secret\r\n\r\n{"):
        httpx.get(f"{process.url}/health", timeout=PATIENCE)  # after those have come
        start = time.monotonic()
        code, said = process.end()
        assert time.monotonic() - start < 30  # the grace
    assert code == 0, said
    lines = said.splitlines()
    assert f"{folder.name} with 1 adapters, up to 16 rows together" in lines
    assert sum("listening on" in line for line in lines) == 1 and not any("%|" in line for line in lines)
    assert any(line.endswith("model=lora prompt=4 generated=4") for line in lines)
    assert "Traceback" not in said, said


@pytest.fixture
def served(folder, root, monkeypatch, capsys):
    """Runs the command in this process, which takes less time, while a function asks; exit code and stderr."""
    logger = logging.getLogger("lowrank_kernels")
    monkeypatch.setattr(logger, "handlers", [])
    bound_socket = arguments.bound_socket

    def serve(ask, *options):
        def bound(*address):
            listener = bound_socket(*address)
            listener.listen()
            asking.append(pool.submit(ask, listener.getsockname()[1]))
            return listener

        asking = []
        monkeypatch.setattr(arguments, "bound_socket", bound)
        with ThreadPoolExecutor(1) as pool:
            code = main(["serve", "--model", str(folder), "--adapters", str(root), "--port", "0", *options])
            asking[0].result(PATIENCE)
        return code, capsys.readouterr().err

    return serve


def test_connections_are_limited_in_number_and_in_time(served):
    def ask(port):
        try:
            with connected(port, HEAD[:40]) as slow, connected(port, HEAD[:40]) as other:
                with connected(port, "") as third:
                    assert third.recv(4096).startswith(b"HTTP/1.1 503 ")
                assert slow.recv(4096) == b"" and other.recv(4096) == b""  # closed: their heads did not come
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).status_code == 200
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    code, said = served(ask, "--max-connections", "2", "--head-seconds", "0.2", "--no-access-log")
    assert code == 0 and "GET /health" not in said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_engine_that_dies_ends_the_command(served, monkeypatch):
    def broken(_):
        raise SystemError("out of order")

    def ask(port):
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body("lora", 0), timeout=PATIENCE)
        assert reply.status_code == 500 and "out of order" in reply.text

    monkeypatch.setattr(Engine, "_admit", broken)
    code, said = served(ask)
    assert code == 1 and said.splitlines()[-1] == "lrk serve: the engine has failed: out of order"
