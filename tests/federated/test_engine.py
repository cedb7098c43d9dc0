"""The same rounds on Flower itself: its simulation, and a super-link and super-nodes in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("flwr", reason="needs the extra 'federated'")
pytest.importorskip("ray", reason="needs the extra 'federated'")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
APP = HERE / "tiny_app"
sys.path.insert(0, str(APP))

from tiny import client_app, server_app  # noqa: E402

from tests.federated.in_process import InProcessGrid  # noqa: E402

spec = importlib.util.spec_from_file_location("federated_run", ROOT / "examples" / "federated_flower" / "run.py")
assert spec is not None and spec.loader is not None
run: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

PATIENCE = 900.0
"""Seconds until a test gives up on an event; a process that imports torch on a busy machine takes its time."""


def without_engine(rule: str, rounds: int, gone: Callable[[int, int], bool] | None = None) -> dict[str, Tensor]:
    """The model after some rounds of two clients in this process."""
    strategy = server_app.make(rule)
    spoil = None if gone is None else lambda node, server_round, reply: None if gone(node, server_round) else reply
    strategy.start(InProcessGrid(client_app.app, 2, spoil), num_rounds=rounds)
    return server_app.weights_of(strategy)


def assert_same(folder: Path, expected: dict[str, Tensor]) -> None:
    found = torch.load(folder / "model.pt", weights_only=True)
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


def environment(home: Path) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**run.environment(home), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def until(event: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = event()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {PATIENCE:.0f} s in vain for {what}")


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "history.json").read_text())


def rounds_done(folder: Path) -> int:
    state = folder / "server.pt"
    return torch.load(state, weights_only=True)["round"] if state.exists() else 0


@pytest.mark.nightly  # of Flower's simulation; test_one_client_is_local_training_bit_for_bit shows the rule without it
def test_simulation_gives_the_same_bits(tmp_path: Path) -> None:
    settings = {"rule": "fedex-lora", "rounds": 2, "folder": str(tmp_path), "timeout": 3600.0}
    script = f"""
import sys
sys.path[:0] = [{str(APP)!r}]
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from tiny import client_app, server_app
app = ServerApp()
app.main()(lambda grid, context: server_app.serve(grid, {settings!r}))
run_simulation(app, client_app.app, 2, backend_config={{"client_resources": {{"num_cpus": 2, "num_gpus": 0.0}}}})
"""
    try:
        # Ray's workers find the app by the path that they are started with.
        paths = {"PYTHONPATH": os.pathsep.join([str(APP), environment(tmp_path)["PYTHONPATH"]])}
        subprocess.run(
            [sys.executable, "-c", script], check=True, env={**environment(tmp_path), **paths}, timeout=PATIENCE
        )
    finally:
        run.stop(tmp_path)
    assert [sorted(record["clients"]) for record in history(tmp_path)] == [["client 0", "client 1"]] * 2
    assert_same(tmp_path, without_engine("fedex-lora", 2))


@pytest.mark.nightly  # of `flwr run`; test_one_client_of_fed_rac_lora_is_a_local_chain_bit_for_bit shows the rule
def test_flwr_run_offline_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines())
    command = [sys.executable, str(Path(run.__file__)), "--app", str(APP), "--rule", "fed-rac-lora", "--clients", "2"]
    command += ["--set", f'folder="{tmp_path}"', "rounds=2"]
    subprocess.run(command, check=True, env=environment(tmp_path), timeout=PATIENCE)
    assert_same(tmp_path, without_engine("fed-rac-lora", 2))
    after = set(subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines())
    assert not [args for args in after - before if "superlink" in args or "superexec" in args]


def test_a_run_that_is_asked_to_end_stops_what_it_started() -> None:
    background = "import time; time.sleep(600)"
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {background!r}], start_new_session=True)"
    script = f"""
import subprocess, sys
sys.path.insert(0, {str(Path(run.__file__).parent)!r})
import run
started = subprocess.run
def flwr(command, env):
    started([sys.executable, "-c", {starts!r}], env=env, check=True)
    print(env["FLWR_HOME"], flush=True)
    return started(["sleep", "600"], env=env)
run.subprocess.run = flwr
sys.argv = ["run.py"]
sys.exit(run.main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        home = Path(process.stdout.readline().strip())
        try:
            assert run.left_behind(home)
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM and not home.exists()
            assert not any(map(run.is_running, run.left_behind(home)))
        finally:
            run.stop(home)


class Deployment:
    """A super-link and super-nodes, each with a Flower home of its own, by which its processes are found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = [self._free_port() for _ in range(3)]
        self.homes: list[Path] = []
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.home = self._home("user")
        link = f'address = "127.0.0.1:{self.ports[0]}"\ninsecure = true\n'
        (self.home / "config.toml").write_text(f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\n{link}')

    @staticmethod
    def _free_port() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    def _home(self, name: str) -> Path:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        self.homes.append(home)
        return home

    def _begin(self, name: str, *command: str) -> None:
        with (self.logs / name).open("ab") as log:
            subprocess.Popen(command, env=environment(self._home(name)), stdout=log, stderr=log, cwd=self.folder)

    def server(self) -> None:
        log = self.logs / "server"
        before = log.read_text().count("Uvicorn running") if log.exists() else 0
        port = str(self.ports[0])
        self._begin("server", "flower-superlink", "--insecure", "--port", port, "--database", "link.db")
        until(lambda: log.read_text().count("Uvicorn running") > before, "the super-link")

    def client(self, place: int) -> None:
        link, own = f"127.0.0.1:{self.ports[0]}", str(self.ports[1 + place])
        config = f"partition-id={place} num-partitions=2"
        command = ["flower-supernode", "--insecure", "--superlink", link, "--port", own, "--node-config", config]
        self._begin(f"client{place}", *command)

    def run(self, **settings: Any) -> None:
        said = " ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in settings.items())
        command = ["flwr", "run", str(APP), "-c", f'folder="{self.folder}" {said}']
        subprocess.run(command, check=True, env=environment(self.home), timeout=PATIENCE)

    def kill(self, name: str) -> None:
        """kill -9 of all its processes."""
        pids = run.left_behind(self.folder / name)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(run.is_running, pids)), f"the end of {name}")

    def end(self) -> None:
        for home in self.homes:
            run.stop(home)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    found = Deployment(tmp_path)
    try:
        yield found
    finally:
        found.end()


@pytest.mark.nightly  # of one run over loopback; test_a_run_that_was_stopped_goes_on_bit_for_bit shows it for each rule
def test_a_server_that_was_killed_goes_on(deployment: Deployment) -> None:
    folder = deployment.folder
    deployment.server()
    for place in (0, 1):
        deployment.client(place)
    deployment.run(rule="fedex-lora", rounds=50)
    until(lambda: rounds_done(folder), "the first round")
    deployment.kill("server")
    done = rounds_done(folder)
    assert 1 <= done < 50 and not (folder / "history.json").exists()
    deployment.server()
    deployment.run(rule="fedex-lora", rounds=done + 1)
    until((folder / "history.json").exists, "the end of the run")
    assert [record["round"] for record in history(folder)] == list(range(1, done + 2))
    assert_same(folder, without_engine("fedex-lora", done + 1))


@pytest.mark.nightly  # test_silence_errors_and_no_one_left shows what the strategy does then
def test_a_round_goes_on_without_a_client_that_was_killed_in_it(deployment: Deployment) -> None:
    folder = deployment.folder
    deployment.server()
    for place in (0, 1):
        deployment.client(place)
    deployment.run(rule="ffa-lora", rounds=3, waits="1-2", timeout=180.0)
    until((folder / "waiting").exists, "client 1 in round 2")
    deployment.kill("client1")
    until((folder / "history.json").exists, "the end of the run")
    first, second, third = history(folder)
    assert list(first["clients"]) == ["client 0", "client 1"] and not first["left_out"]
    assert list(second["clients"]) == ["client 0"] and list(second["left_out"]) == ["client 1"]
    assert list(third["clients"]) == ["client 0"]
    assert_same(folder, without_engine("ffa-lora", 3, gone=lambda node, server_round: node == 2 and server_round > 1))
