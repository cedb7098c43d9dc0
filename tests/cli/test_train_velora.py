"""`lrk train --method velora`: both forms, what they write, and how they go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaForCausalLM

import lowrank_kernels as lk
from lowrank_kernels.cli import train
from tests.cli.test_train_methods import (  # noqa: F401
    EXAMPLES,
    Tokenizer,
    command,
    tiny_model,
    tiny_task,
)

DENSE = ("--velora-form", "dense")


def dense(*more: str, steps: int = 12) -> int:
    """A run of the dense form; the command that all methods share has options of factors, which it refuses."""
    from lowrank_kernels.cli import main

    options = ["--batch-size", "4", "--sub-tokens", "8", "--learning-rate", "3e-3", *DENSE]
    return main(["train", "--method", "velora", "--steps", str(steps), *options, *more])


def test_the_dense_form_trains_the_linears_and_nothing_else(tmp_path: Path) -> None:
    assert dense("--output", str(tmp_path / "model"), "--json", str(tmp_path / "run.json")) == 0
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["held_out_after"] < result["held_out_before"]
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, before in tiny_model(torch.float32).named_parameters():
        assert torch.equal(before, trained[name]) == ("_proj" not in name), name


def test_the_dense_form_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed, state = (tmp_path / name for name in ("whole.json", "resumed.json", "state.pt"))
    assert dense("--json", str(whole)) == 0
    assert dense("--checkpoint", str(state), "--stop-after", "6") == 0
    assert dense("--checkpoint", str(state), "--json", str(resumed)) == 0
    a, b = (json.loads(path.read_text()) for path in (whole, resumed))
    for key in ("losses", "held_out_before", "held_out_after"):
        assert a[key] == b[key], key


@pytest.mark.parametrize("form", ["lora", "dense"])
def test_a_checkpoint_holds_the_vectors(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run takes those of its file, though it has made others of its own first."""
    models = []

    def load(args):
        models.append(tiny_model(torch.float32))
        return models[-1], Tokenizer(), EXAMPLES, EXAMPLES[:8]

    monkeypatch.setattr(train, "load_task", load)
    run = dense if form == "dense" else lambda *more: command("velora", *more)
    state = tmp_path / "state.pt"
    assert run("--checkpoint", str(state), "--stop-after", "2") == 0
    saved = torch.load(state, weights_only=True)
    vectors = {name: v for name, v in saved["run"]["parameters"].items() if name.endswith("velora_vector")}
    assert len(vectors) == 14
    for v in vectors.values():
        torch.testing.assert_close(v.norm(), torch.tensor(1.0))
        v.copy_(torch.nn.functional.normalize(torch.arange(1.0, 1 + len(v)), dim=0))
    torch.save(saved, state)
    assert run("--checkpoint", str(state)) == 0
    for name, buffer in models[-1].named_buffers():
        if name in vectors:
            assert torch.equal(buffer, vectors[name]), name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--sub-tokens", "5"), "to divide K = 32 of model.layers.0.self_attn.q_proj, got 5"),
        ((*DENSE, "--rank", "4"), "--rank: is not an option of --velora-form dense"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("velora", *more) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1] and "Traceback" not in said


def test_the_dense_form_asks_for_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    from lowrank_kernels.cli import main

    assert main(["train", "--method", "velora", "--sub-tokens", "8", *DENSE]) == 2
    assert "--velora-form dense: expected --learning-rate, got none" in capsys.readouterr().err.splitlines()[-1]


def test_over_a_base_of_few_bits(tmp_path: Path) -> None:
    assert command("velora", "--base", "int8", "--output", str(tmp_path)) == 0
    lk.load_adapter(tiny_model(torch.float32), tmp_path)
