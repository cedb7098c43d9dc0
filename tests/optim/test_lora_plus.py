"""LoRA+: every parameter that trains is in exactly one group, at its rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.optim import lora_plus, lora_plus_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(5, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(self.embed(ids)))


@pytest.fixture(params=["none", "all"])
def grouped(request: pytest.FixtureRequest) -> tuple[Model, list[dict[str, Any]]]:
    """A model whose embedding trains beside DoRA, with biases or without, and its groups."""
    model = Model()
    lk.adapt(model, lk.DoRAConfig(r=2, bias=request.param))
    model.embed.weight.requires_grad_(True)
    return model, lora_plus_groups(model, 1e-3, ratio=8, weight_decay=0.1)


def test_groups_are_complete_and_disjoint(grouped: tuple[Model, list[dict[str, Any]]]) -> None:
    model, groups = grouped
    seen = [id(p) for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen)) and set(seen) == {id(p) for p in model.parameters() if p.requires_grad}


def test_factors_embeddings_and_vectors_have_groups_of_their_own(grouped: tuple[Model, list[dict[str, Any]]]) -> None:
    model, groups = grouped
    by_name = {group["name"]: group for group in groups}
    assert {tuple(p.shape) for p in by_name["A"]["params"]} == {(2, 8), (2, 6)}
    assert {tuple(p.shape) for p in by_name["B"]["params"]} == {(6, 2), (4, 2)}
    assert by_name["embedding"]["params"] == [model.embed.weight]
    assert all(p.dim() == 1 for p in by_name["vectors"]["params"])


def test_each_group_has_its_rate_and_decay(grouped: tuple[Model, list[dict[str, Any]]]) -> None:
    _, groups = grouped
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"A": (1e-3, 0.1), "B": (8e-3, 0.1), "embedding": (1e-6, 0.1), "vectors": (8e-3, 0.0)}


def test_plain_lora_has_the_two_groups_of_the_paper_and_trains() -> None:
    model = Model()
    lk.adapt(model, lk.LoRAConfig(r=2))
    optimizer = lora_plus(model, 1e-3, betas=(0.9, 0.95), foreach=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("A", 1e-3), ("B", 16e-3)]
    model(torch.arange(5)).square().sum().backward()
    before = model.one.lora_B.weight.detach().clone()
    optimizer.step()
    # Adam's first step is the rate itself.
    torch.testing.assert_close((model.one.lora_B.weight - before).abs(), torch.full((6, 2), 16e-3), rtol=1e-3, atol=0)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"lora_plus_groups: expected ratio of at least 0, got -1"):
        lora_plus_groups(Model(), 1e-3, ratio=-1)
    frozen = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="expected LoRA layers that train, found none in Linear"):
        lora_plus_groups(frozen, 1e-3)
    with pytest.raises(ValueError, match="expected LoRA layers that train, found none in Model"):
        lora_plus_groups(Model(), 1e-3)  # all of it trains, and nothing of it is a factor
