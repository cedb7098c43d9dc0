"""`lrk train --method galore`: linears and vectors train, embeddings and head stay; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaForCausalLM

from lowrank_kernels.cli import train
from tests.cli.test_train_methods import (  # noqa: F401
    EXAMPLES,
    Tokenizer,
    command,
    quantised,
    tiny_model,
    tiny_task,
    without_targets,
)


def test_linears_and_vectors_move_and_nothing_else(tmp_path: Path) -> None:
    assert command("galore", "--output", str(tmp_path)) == 0
    trained = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, before in tiny_model(torch.float32).named_parameters():
        stays = "embed_tokens" in name or "lm_head" in name
        assert torch.equal(before, trained[name]) == stays, name


def test_the_change_of_a_weight_has_no_more_directions_than_it_was_given(tmp_path: Path) -> None:
    """Rank 2 and one basis for all steps: W has moved within two columns of U."""
    more = ("--projection-rank", "2", "--projection-steps", "100", "--output", str(tmp_path))
    assert command("galore", *more, steps=6) == 0
    trained = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    change = trained[name] - dict(tiny_model(torch.float32).named_parameters())[name]
    values = torch.linalg.svdvals(change.detach())
    assert values[1] > 0 and values[2] < 1e-4 * values[0]


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda: tiny_model(torch.float32), ("--projection-rank", "40"), "min(N, K) = 32 for model.layers.0.self_attn"),
        (without_targets, (), "found none for down_proj, gate_proj"),
        (quantised, (), "q_proj.weight is frozen"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    make: Callable[[], Any],
    more: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make()
    flags = [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr(train, "load_task", lambda args: (model, Tokenizer(), EXAMPLES, EXAMPLES[:8]))
    assert command("galore", *more) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1] and "Traceback" not in said
    assert [p.requires_grad for p in model.parameters()] == flags
