"""Signatures that a reader can hold in mind, read from the source."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("lowrank_kernels", "benchmarks", "tests", "setup.py")
MOST_POSITIONAL = 8
MOST_UNFORMATTED = 60
UNFORMATTED = "# fmt: " + "skip"


def python_files() -> list[Path]:
    """Those that git tracks; all of them where this is no repository."""
    listed = subprocess.run(["git", "ls-files", "--", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.splitlines() if (path := ROOT / name).exists()]
    return [
        path for place in PLACES for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]


def is_triton(function: ast.AST) -> bool:
    """True for a function under ``@triton.jit``, ``@triton.jit(...)`` or ``@jit``."""
    for decorator in getattr(function, "decorator_list", []):
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(name).rpartition(".")[2] == "jit":
            return True
    return False


def crowded(source: str) -> Iterator[tuple[int, str, int]]:
    """(line, name, count) of each function with too many positional parameters."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_triton(node):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MOST_POSITIONAL:
            yield node.lineno, getattr(node, "name", "lambda"), count


def test_no_function_takes_more_than_eight_positional_arguments() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name} takes {count}"
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in PLACES
        for line, name, count in crowded(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(a, b, c, d, /, e, f, g, h, i): ...", 9),
        ("class A:\n def f(self, a, b, c, d, e, f, g, h): ...", None),
        ("def f(a, b, *, c, d, e, f, g, h, i, j): ...", None),
        ("g = lambda a, b, c, d, e, f, g, h, i: 0", 9),
        ("@triton.jit\ndef f(a, b, c, d, e, f, g, h, i): ...", None),
        ("@triton.jit(do_not_specialize=['a'])\ndef f(a, b, c, d, e, f, g, h, i): ...", None),
        ("@other\ndef f(a, b, c, d, e, f, g, h, i): ...", 9),
    ],
)
def test_positional_parameters_are_counted(source: str, count: int | None) -> None:
    assert [found[2] for found in crowded(source)] == ([] if count is None else [count])


def test_the_formatter_is_rarely_switched_off() -> None:
    counts = {path.relative_to(ROOT): path.read_text().count(UNFORMATTED) for path in python_files()}
    most = sorted(((n, str(path)) for path, n in counts.items() if n), reverse=True)
    assert sum(counts.values()) <= MOST_UNFORMATTED, f"{sum(counts.values())}: {most[:10]}"
