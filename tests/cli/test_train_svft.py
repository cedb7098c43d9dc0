"""`lrk train --method svft`: the options of a pattern, a base of few bits, and a run that goes on elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import lowrank_kernels as lk
from lowrank_kernels.nn import SVFTLinear
from tests.cli.test_train_methods import command, last_line, tiny_model, tiny_task  # noqa: F401
from tests.nn.test_svft_layer import elsewhere


@pytest.mark.parametrize(
    ("more", "count"), [(("--pattern", "plain"), 32), (("--pattern", "top", "--places", "50"), 50), ((), 32 * 9 - 20)]
)
def test_the_places_are_those_of_the_options(more: tuple[str, ...], count: int, tmp_path: Path) -> None:
    assert command("svft", *more, "--output", str(tmp_path), steps=2) == 0
    model = tiny_model(torch.float32)
    lk.load_svft(model, tmp_path)
    layers = [m for m in model.modules() if isinstance(m, SVFTLinear)]
    assert len(layers) == 14 and {len(layer.values) for layer in layers} == {count}
    assert all(layer.values.abs().sum() > 0 for layer in layers)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--pattern", "plain", "--places", "9"), "--places: is not an option of --pattern plain"),
        (("--pattern", "random", "--places", "2000"), "expected k of at most r² = 1024 for M (r, r), got 2000"),
        (("--band", "32"), "expected band below r = 32"),
    ],
)
def test_a_pattern_that_does_not_fit_is_told_in_one_line(
    more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in last_line(capsys, "svft", *more)


def test_a_run_goes_on_where_the_singular_vectors_have_other_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, state = (tmp_path / "whole", tmp_path / "parts"), str(tmp_path / "state.pt")
    assert command("svft", "--output", str(folders[0])) == 0
    assert command("svft", "--checkpoint", state, "--stop-after", "6") == 0
    elsewhere(monkeypatch)
    assert command("svft", "--checkpoint", state, "--output", str(folders[1])) == 0
    outputs = []
    for folder in folders:
        model = tiny_model(torch.float32)
        lk.load_svft(model, folder)
        outputs.append(model(torch.arange(20)[None] % 30).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_over_a_base_of_few_bits() -> None:
    assert command("svft", "--base", "int8", steps=2) == 0
