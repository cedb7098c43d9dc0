"""The picture of what a method decided: how modules are put in panels, and when `lrk train` draws it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from lowrank_kernels.cli import decided, train
from lowrank_kernels.cli.decided import by_kind, draw_beside, draw_history
from tests.cli.test_train_methods import command, load_tiny_task


@pytest.mark.parametrize(
    ("modules", "panels"),
    [
        (
            ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"],
            {"q_proj": [("0", 0), ("1", 2)], "up_proj": [("0", 1)]},
        ),
        (["0", "2"], {"*": [("0", 0), ("2", 1)]}),
        (["lm_head", "h.3.c_attn"], {"lm_head": [("", 0)], "c_attn": [("3", 1)]}),
        (
            ["layer.0.attention.output.dense", "layer.0.output.dense"],
            {"layer.*.attention.output.dense": [("0", 0)], "layer.*.output.dense": [("0", 1)]},
        ),
    ],
)
def test_modules_whose_paths_differ_in_a_number_are_of_one_kind(modules: list[str], panels: dict[str, Any]) -> None:
    assert by_kind(modules) == panels


@pytest.mark.parametrize(
    "values", [[[8, 4], [6, 6]], [[1, 0], [0, 1]], [[0.5, None], [0.25, 1e-3]], [[0, 0], [0, 0]], [[None] * 2] * 2]
)
def test_any_numbers_are_drawn(values: list[list[Any]], tmp_path: Path) -> None:
    history = {"what": "rank", "steps": [1, 50], "modules": ["h.0.q", "h.1.v"], "values": values}
    draw_history(tmp_path / "new" / "x.png", history, "some method")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = {"what": "rank", "steps": [1], "modules": ["a"], "values": [[1]]}
    (tmp_path / "x.png").write_text("{}")
    assert draw_beside(tmp_path / "x.png", history, "m") is None  # it would be written over
    assert draw_beside(Path("/dev/null"), history, "m") is None
    (tmp_path / "x.json").write_text("{}")
    assert draw_beside(tmp_path / "x.json", {**history, "steps": [], "values": []}, "m") is None
    monkeypatch.setattr(decided.importlib.util, "find_spec", lambda name: None)
    assert draw_beside(tmp_path / "x.json", history, "m") is None


def test_a_run_writes_its_history_and_picture_beside_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_task", load_tiny_task)
    for method, drawn in (("xgblora", True), ("cola", False)):
        file = tmp_path / f"{method}.json"
        assert command(method, "--json", str(file)) == 0
        history = json.loads(file.read_text())["history"]
        assert file.with_suffix(".png").exists() == drawn == (history is not None)
    history = json.loads((tmp_path / "xgblora.json").read_text())["history"]
    assert history["steps"] == [1, 5, 9] and len(history["modules"]) == 14
    assert [sum(row) for row in history["values"]] == [4, 4, 4]
