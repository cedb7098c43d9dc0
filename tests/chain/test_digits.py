"""The paper's claim in small: a chain of one-sided links learns what one one-sided correction cannot."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("sklearn")


def test_rac_is_thirty_points_above_the_one_sided_run_without_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "methods"))
    digits = importlib.import_module("digits")
    base = digits.pretrained(0)
    accuracy = {method: digits.tune(method, base, 0) for method in ("rac-lora", "asymmetric")}
    assert accuracy["rac-lora"] > accuracy["asymmetric"] + 30, accuracy
