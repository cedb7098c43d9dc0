"""Changes that a page of the docs walks through, kept as patches: a test applies each and runs what it makes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_kernels

ROOT = Path(lowrank_kernels.__file__).parent.parent


def touched_by(patch: str) -> list[str]:
    """The files that a patch adds or changes."""
    text = (Path(__file__).parent / patch).read_text()
    return re.findall(r"^diff --git a/(\S+)", text, re.MULTILINE)


def blocks_not_in(patch: str, page: str) -> tuple[int, list[str]]:
    """(how many blocks of Python a page shows, those that the patch does not add as they are)."""
    text = (Path(__file__).parent / patch).read_text()
    added = "\n".join(line[1:] for line in text.splitlines() if re.match(r"\+(?!\+\+ )", line)) + "\n"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return len(blocks), [block for block in blocks if block not in added]


def patched_copy(folder: Path, patch: str, *places: str) -> Path:
    """``folder``, with a copy of the package and of ``places``, to which the patch is applied."""
    if shutil.which("git") is None:
        pytest.skip("needs git to apply a patch")

    def copy(source: str, target: str) -> None:
        (os.symlink if source.endswith(".so") else shutil.copyfile)(source, target)

    for name in ("lowrank_kernels", "pyproject.toml", "tests/conftest.py", *places):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            compiled = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, copy_function=copy, ignore=compiled, dirs_exist_ok=True)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # the copy is no repository
    subprocess.run(["git", "apply", str(Path(__file__).parent / patch)], cwd=folder, env=outside, check=True)
    assert [name for name in touched_by(patch) if not (folder / name).is_file()] == []
    return folder


def run_in(tree: Path, *arguments: str) -> str:
    """What Python prints that runs in the copy, with its package; it must end well."""
    own = {**os.environ, "PYTHONPATH": str(tree)}
    ran = subprocess.run([sys.executable, *arguments], cwd=tree, env=own, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def run_tests_in(tree: Path, *arguments: str) -> None:
    """Run tests in the copy, by its own package; some must run, and none may be skipped."""
    where = run_in(tree, "-c", "import lowrank_kernels; print(lowrank_kernels.__file__)")
    assert Path(where.strip()).is_relative_to(tree)
    said = run_in(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert "passed" in said and "skipped" not in said, said
