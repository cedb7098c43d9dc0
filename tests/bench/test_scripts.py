"""Every script under benchmarks/ still imports what it uses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import lowrank_kernels

pytest.importorskip("transformers")
BENCHMARKS = Path(lowrank_kernels.__file__).parent.parent / "benchmarks"


OF_ENGINES = {p for p in (BENCHMARKS / "engines").glob("*.py") if p.name not in ("cases.py", "check.py")}
"""Run by the engines' own environments, with their packages."""


@pytest.mark.parametrize("path", sorted(OF_ENGINES), ids=lambda p: p.name)
def test_a_script_of_an_engine_is_python(path):
    compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize(
    "path", sorted({*BENCHMARKS.rglob("*.py")} - OF_ENGINES), ids=lambda p: str(p.relative_to(BENCHMARKS))
)
def test_a_script_imports(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(path.parent), str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert hasattr(module, "main") or path.name.startswith("bench_") or path.parent.name in ("methods", "engines")
