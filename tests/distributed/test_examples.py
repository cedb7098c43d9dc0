"""The examples run under torchrun on two gloo processes: what they show is tested in test_fsdp2 and
test_tensor_parallel, therefore nightly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["fsdp2_qlora", "tensor_parallel"])
def test_an_example_trains_and_saves(name, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / f"{name}.py"), "--steps", "11", "--save", str(tmp_path / "adapter")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    first, last = (float(loss) for loss in re.findall(r"loss (\S+)", found.stdout))
    assert last < first - 0.2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
