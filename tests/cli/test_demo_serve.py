"""`lrk demo --serve` on a language model small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from lowrank_kernels.cli import demo_serve, docstrings, main


class Tokenizer:
    """One token a character; what the demo needs of a tokenizer, and no more."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 30 for c in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(96 + token) for token in tokens)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library's functions are described by a letter of its own."""
    examples = [
        docstrings.Example(library, f"f{i}", f"# {library}\ndef f{i}():", 3 * "abcd"[number] + '"""')
        for number, library in enumerate(docstrings.MODULES)
        for i in range(6)
    ]

    def load(args: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval(), Tokenizer(), examples, examples

    monkeypatch.setattr(demo_serve, "load_task", load)


COMMAND = ["demo", "--serve", "--steps", "6", "--batch-size", "8", "--rank", "4", "--learning-rate", "0.02"]


@pytest.mark.usefixtures("task")
def test_each_adapter_learns_its_own_and_says_the_same_in_the_batch(tmp_path: Path, capsys: Any) -> None:
    assert main([*COMMAND, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "serve" / "demo.json").read_text())
    assert len(found["rows"]) == 9 and all(row["same"] for row in found["rows"])
    assert all(losses["after"] < losses["before"] - 0.1 for losses in found["held_out"].values())
    assert (tmp_path / "serve" / "adapters" / "torch" / "adapter_model.safetensors").is_file()
    assert "9 of 9 rows" in capsys.readouterr().out


@pytest.mark.usefixtures("task")
def test_a_row_that_is_not_its_adapters_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = demo_serve._merged
    monkeypatch.setattr(demo_serve, "_merged", lambda base, folder: merged(base, folder.with_name("torch")))
    assert main([*COMMAND, "--output", str(tmp_path)]) == 1
