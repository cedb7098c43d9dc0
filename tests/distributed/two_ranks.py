"""Checks that two gloo processes run together: one start for all of a file, each check reported by itself."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (2,))


def close(actual, expected, rtol=2e-4, atol=2e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def refuses(message, call, *args, error=ValueError):
    try:
        call(*args)
    except error as raised:
        assert re.search(message, str(raised)), raised
        return
    raise AssertionError(f"{call} did not refuse")


def _run_all(rank: int, folder: str, checks: Sequence[Callable[[], Any]]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for check in checks:
        try:
            check()
            said = "passed"
        except Exception:
            said = traceback.format_exc()
        (Path(folder) / f"{check.__name__}.{rank}").write_text(said)
        dist.barrier()
    sys.stdout.flush()
    # gloo's threads may still let go of tensors, for which they take the interpreter's lock: one that is being
    # torn down ends them, and the process, by SIGABRT (pytorch/pytorch#179291).
    os._exit(0)


def _start(folder: Path, checks: Sequence[Callable[[], Any]], limit: float) -> None:
    context = torch.multiprocessing.spawn(_run_all, (str(folder), checks), nprocs=2, join=False)
    deadline = time.monotonic() + limit
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            break


def on_two_ranks(checks: Sequence[Callable[[], Any]], limit: float = 240) -> Any:
    """A test of every check on both ranks. The first one that runs starts the two processes, for all of them, and
    ends them after ``limit`` seconds."""
    ran: list[Path] = []

    def folder(tmp_path_factory):
        """Where the processes work, once they have ended."""
        if not ran:
            ran.append(tmp_path_factory.mktemp("two_ranks"))
            _start(ran[0], checks, limit)
        return ran[0]

    @pytest.mark.parametrize("check", checks, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("rank", [0, 1])
    def test(tmp_path_factory, check, rank):
        file = folder(tmp_path_factory) / f"{check.__name__}.{rank}"
        assert file.exists(), "the processes did not get there"
        said = file.read_text()
        assert said == "passed", said

    test.folder = folder
    return test
