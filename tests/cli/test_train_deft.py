"""`lrk train --method deft`: the term reaches the gradients, not the losses that are told; density before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.cli.test_train_methods import command, tiny_task  # noqa: F401


def run(folder: Path, alpha: str) -> dict[str, Any]:
    out = folder / f"{alpha}.json"
    more = ("--density-alpha", alpha, "--density-eps", "0.01", "--density-every", "5", "--json", str(out))
    assert command("deft", *more) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_density_falls_with_the_term_and_the_loss_is_told_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, sparse = run(tmp_path, "0"), run(tmp_path, "2")
    assert sparse["losses"][0] == plain["losses"][0]  # before the first step: without α times the term
    assert sparse["losses"][1:] != plain["losses"][1:]
    history = sparse["history"]
    assert history["steps"][:3] == [1, 6, 11]
    assert history["modules"] == [f"layers.{i}.mlp.act_fn" for i in (0, 1)]
    rows = history["values"][0], history["values"][-1], plain["history"]["values"][-1]
    before, after, without = (sum(row) / 2 for row in rows)
    assert after < before and after < without
    assert sparse["held_out_after"] < sparse["held_out_before"]
    assert f"share of activations above 0.1: {before:.2%} -> {after:.2%}" in capsys.readouterr().err
