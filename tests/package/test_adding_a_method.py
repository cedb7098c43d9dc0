"""docs/adding_a_method.md is true: its four files make a method, which runs like the others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_kernels

pytest.importorskip("transformers")
ROOT = Path(lowrank_kernels.__file__).parent.parent
PATCH = Path(__file__).parent.parent / "patches" / "method.patch"


def test_the_page_shows_what_the_patch_adds():
    added = "\n".join(line[1:] for line in PATCH.read_text().splitlines() if re.match(r"\+(?!\+\+ )", line))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_method.md").read_text(), re.DOTALL)
    assert len(blocks) == 5 and [block for block in blocks if block not in added + "\n"] == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the command and its tests need, with the patch applied."""
    if shutil.which("git") is None:
        pytest.skip("needs git to apply a patch")

    def copy(source: str, target: str) -> None:
        (os.symlink if source.endswith(".so") else shutil.copyfile)(source, target)

    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lowrank_kernels", tmp_path / "lowrank_kernels", copy_function=copy, ignore=compiled)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/cli/test_train_methods.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}  # the copy is no repository
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, env=outside, check=True)
    return tmp_path


def test_four_files_make_a_method_that_learns_stops_and_goes_on(tree: Path):
    touched = re.findall(r"^diff --git a/(\S+)", PATCH.read_text(), re.MULTILINE)
    assert len(touched) <= 4 and all((tree / name).is_file() for name in touched)
    own = {**os.environ, "PYTHONPATH": str(tree)}
    where = "import lowrank_kernels; print(lowrank_kernels.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tree, env=own, check=True, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(tree)
    tests = ["tests/cli/test_toy.py", "tests/cli/test_train_methods.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "toy", *tests]
    ran = subprocess.run(command, cwd=tree, env=own, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout and "skipped" not in ran.stdout, ran.stdout
