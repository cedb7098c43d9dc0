"""What the C++ kernels promise on each instruction set below this processor's best: the tests that say so, run again.

LRK_CPU_ISA is read once per process, so each level has a subprocess, one for all suites.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kernels import _extension

TESTS = Path(__file__).resolve().parents[1]
CORE = {
    "ops/test_block_sparse.py": "core or (adamw_is_torchs and cpu)",
    "ops/test_blocks.py": "core",
    "ops/test_cpu_fused.py": "core",
    "ops/test_cpu_kernels.py": "core",
    "ops/test_dora.py": "core",
    "ops/test_every_family.py": "as_exact_as_eager and cpu and (multi_lora or frozen)",
    "ops/test_galore.py": "core and cpu",
    "ops/test_importance.py": "core and cpu",
    "ops/test_magnitude.py": "core and cpu",
    "ops/test_merge.py": "core and cpu",
    "ops/test_svft.py": "core and cpu",
    "weights/test_coded.py": "decodes or roundings or dense_results or as_exact",
    "weights/test_stored.py": "decodes or as_exact",
}
"""Which tests of which suites, in the words of pytest's -k."""


@pytest.mark.skipif(not _extension.available(), reason="the extension is not built")
@pytest.mark.parametrize(
    "level",
    [
        _extension.ISAS[0],
        *(
            pytest.param(level, marks=pytest.mark.nightly) for level in _extension.ISAS[1:3]
        ),  # minutes where all can run
    ],
)
def test_every_instruction_set(level: str) -> None:
    best = str(_extension.cpu_isa())
    if _extension.ISAS.index(level) >= _extension.ISAS.index(best):
        pytest.skip(f"this process runs on {best}")
    environment = {**os.environ, "LRK_CPU_ISA": level}
    probe = "from lowrank_kernels import _extension; print(_extension.cpu_isa())"
    said = subprocess.run(
        [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, cwd=TESTS.parent
    )
    assert said.stdout.strip() == level
    words = " or ".join(f"({Path(suite).stem} and ({core}))" for suite, core in CORE.items())
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(TESTS / suite for suite in CORE),
            "-k",
            words,
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
