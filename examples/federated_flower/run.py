"""One run of a Flower app in simulation, offline, with nothing left behind: `python run.py [--rule flexlora]`.

It is `flwr run` with the settings that keep Flower from installing and reporting anything, in a Flower home of its own.
The super-link that `flwr run` starts in the background, and what that has started, are stopped at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
OFFLINE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


def environment(home: Path) -> dict[str, str]:
    """Of every process of a run; programs of the environment that this Python is of come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **OFFLINE, "FLWR_HOME": str(home), "PATH": path}


def left_behind(home: Path) -> set[int]:
    """Processes that were started with this Flower home, and all that they have started, but for this one (Linux).

    Ray's write their titles over their environments, so that only their parents tell whose they are.
    """
    mark, found, children = f"FLWR_HOME={home}".encode(), [], defaultdict[int, list[int]](list)
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit():
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                children[parent].append(int(place.name))
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
        except OSError:  # another user's, or gone
            continue
    whole: set[int] = set()
    while found:
        pid = found.pop()
        if pid not in whole:
            whole.add(pid)
            found += children[pid]
    return whole - {os.getpid()}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stop(home: Path, patience: float = 10.0) -> None:
    """Ask all of them to end, and end those that have not."""
    ours: set[int] = set()
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        ours |= left_behind(home)
        for pid in filter(is_running, ours):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + wait
        while any(map(is_running, ours)) and time.monotonic() < until:
            time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--app", type=Path, default=HERE, help="folder of the app (default: this one)")
    parser.add_argument("--rule", help="the setting `rule` of pyproject.toml")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings, as TOML has them")
    parser.add_argument("--clients", type=int, default=4, help="simulated super-nodes (default 4)")
    args = parser.parse_args()
    settings = ([f'rule="{args.rule}"'] if args.rule else []) + args.set
    command = ["flwr", "run", str(args.app), "--stream", "--federation-config", f"num-supernodes={args.clients}"]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # else `finally` would not run
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        try:
            return subprocess.run(
                [*command, *(["-c", " ".join(settings)] if settings else [])], env=environment(home)
            ).returncode
        finally:
            stop(home)


if __name__ == "__main__":
    sys.exit(main())
