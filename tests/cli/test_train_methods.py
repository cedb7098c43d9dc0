"""`lrk train` with every method, on a language model small enough for a test: it learns, stops, and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import lowrank_kernels as lk
from lowrank_kernels.cli import docstrings, main, train
from lowrank_kernels.cli.methods import METHODS


class Tokenizer:
    """One token a character; what the training loop needs of a tokenizer, and no more."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 30 for c in text]}

    def save_pretrained(self, folder: Path) -> None:
        pass


def tiny_model(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(autouse=True)
def tiny_task(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [docstrings.Example("t", f"f{i}", f"def f{i}", "abab" * (1 + i % 3)) for i in range(24)]

    def load(args: Any) -> Any:
        return tiny_model(train.DTYPES[args.dtype or "float32"]), Tokenizer(), examples, examples[:8]

    monkeypatch.setattr(train, "load_task", load)


COMMON = [
    "--rank",
    "4",
    "--batch-size",
    "4",
    "--steps-per-link",
    "4",
    "--link-warmup",
    "2",
    "--gradient-batches",
    "4",
    "--block-size",
    "16",
    "--budget",
    "0.1",
    "--warmup-steps",
    "2",
]
RATES = {"lora-pro": "0.3", "lora-rite": "5e-3"}


def command(method: str, *more: str, steps: int = 12) -> int:
    rate = ["--learning-rate", RATES.get(method, "1e-2")]
    return main(["train", "--method", method, "--steps", str(steps), *COMMON, *rate, *more])


@pytest.mark.parametrize(
    ("method", "more"), [*((method, ()) for method in METHODS), ("cola", ("--link-ranks", "4", "2", "1"))]
)
def test_it_learns_stops_and_goes_on_bit_for_bit(
    method: str, more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed, state = tmp_path / "whole.json", tmp_path / "resumed.json", tmp_path / "state.pt"
    assert command(method, "--json", str(whole), "--output", str(tmp_path / "out"), "--dropout", "0.1", *more) == 0
    parts = ["--checkpoint", str(state), "--dropout", "0.1", *more]
    assert command(method, *parts, "--stop-after", "6") == 0  # in the middle of a link
    assert "stopped after step 6 of 12" in capsys.readouterr().out
    assert command(method, *parts, "--json", str(resumed), "--output", str(tmp_path / "again")) == 0
    first, second = (json.loads(path.read_text()) for path in (whole, resumed))
    assert first["held_out_after"] < first["held_out_before"]
    for key in ("losses", "held_out_before", "held_out_after", "links"):
        assert first[key] == second[key], key
    assert first["links"] == (3 if METHODS[method].chain else 0)
    saved = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("out", "again")]
    assert saved[0] == saved[1]
    if METHODS[method].chain:
        assert "model.safetensors" in saved[0] and "adapter_config.json" not in saved[0]
    elif METHODS[method].blocks:
        lk.smt.load_delta(tiny_model(torch.float32), tmp_path / "out")
    else:
        lk.load_adapter(tiny_model(torch.float32), tmp_path / "out")


@pytest.mark.parametrize("more", [["--rounding", "stochastic"], ["--master"]])
def test_chains_over_bfloat16(more: list[str]) -> None:
    assert command("rac-lora", "--dtype", "bfloat16", *more) == 0


@pytest.mark.parametrize("method", ["lora", "rac-lora", "lora-rite"])
def test_a_gradient_that_is_not_finite_moves_nothing(method: str) -> None:
    from lowrank_kernels.cli import training as loop

    model = tiny_model(torch.float32)
    settings = METHODS[method].settings
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("q_proj",), **settings))
    run = loop.Run(method, model, 1e-2, 10, METHODS[method].optimizer)
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_B.weight.register_hook(lambda g: g * float("nan"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = loop.encode(Tokenizer(), [docstrings.Example("t", "f", "def f", "abab")], "cpu")
    with pytest.raises(ValueError, match=f"{method}: expected a finite loss and gradient, got .* at step 1, which was"):
        run.step(batch)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state.pt"
    assert command("lora", "--checkpoint", str(state), "--stop-after", "1") == 0
    for arguments, words in (
        (["lora", "--checkpoint", str(state), "--rank", "3"], "is of a run with rank=4"),
        (["cola", "--checkpoint", str(state)], "is of a run with method=lora"),
        (["rac-lora", "--rounding", "stochastic"], "rac_lora: expected bfloat16 weights for stochastic rounding"),
        (["rac-lora", "--rank", "40"], "expected a rank of at most 32"),
        (["cola", "--link-ranks", "4", "5"], "cola: expected ranks from 1 to the layers' own of 4, one a link"),
        (["cola", "--steps-per-link", "0"], "cola: expected steps_per_link of at least 1"),
        (["lora-ga", "--rank", "20"], "lora_ga: expected a rank of at most"),
        (["lora-ga", "--gradient-batches", "0"], "estimate_gradients: expected at least one batch"),
    ):
        capsys.readouterr()
        assert command(*arguments) == 2, arguments
        assert words in capsys.readouterr().err.splitlines()[-1]
    state.write_bytes(b"nothing")
    capsys.readouterr()
    assert command("lora", "--checkpoint", str(state)) == 2
    assert "to be one of `lrk train`" in capsys.readouterr().err
