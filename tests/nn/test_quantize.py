"""``quantize_`` and ``CodedLinear``: a model's linears in few bits, and what is trained, saved and served over them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.nn import CodedLinear
from lowrank_kernels.weights import FP8Weight, NF4Weight, of

FORMATS = ("nf4", "fp4", "int8", "fp8", "mxfp4")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        y: Tensor = self.head(hidden + self.down(torch.tanh(self.up(hidden))))
        return y


IDS = torch.arange(24).view(3, 8) % 50


@pytest.mark.parametrize("format_", FORMATS)
def test_linears_become_codes_of_their_weights(format_: str) -> None:
    plain, model = Model(), Model()
    report = lk.quantize_(model, format_)
    assert [r.name for r in report.replaced] == ["up", "down"]
    assert [(s.name, s.reason) for s in report.skipped] == [("head", "the output head")]
    for name in ("up", "down"):
        module, before = getattr(model, name), getattr(plain, name)
        assert isinstance(module, CodedLinear)
        dense = of(module).dense()
        assert 0 < (dense - before.weight).norm() / before.weight.norm() < 0.16
        with torch.no_grad():
            before.weight.copy_(dense)
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-4, atol=1e-4)
    assert report.total == sum(p.numel() for p in plain.parameters())


def test_x_gets_its_gradient_and_the_weight_none() -> None:
    linear = nn.Linear(64, 40)
    coded = CodedLinear(NF4Weight.from_dense(linear.weight), linear.bias)
    x = torch.randn(5, 64, requires_grad=True)
    coded(x).sum().backward()
    torch.testing.assert_close(x.grad, of(coded).dense().sum(0).expand(5, 64))
    assert not [p for p in coded.parameters() if p.requires_grad]


@pytest.mark.parametrize("config", [lk.LoRAConfig(r=4), lk.DoRAConfig(r=4)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("format_", FORMATS)
def test_it_is_adapted_trained_saved_and_loaded(format_: str, config: Any, tmp_path: Path) -> None:
    model = Model()
    lk.quantize_(model, format_)
    base = copy.deepcopy(model)
    torch.manual_seed(1)
    lk.adapt(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lk.save_adapter(model, tmp_path)
    again = copy.deepcopy(base)
    lk.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(IDS), model(IDS))
    bank = lk.serving.AdapterBank(base)
    bank.load("a", tmp_path)
    with torch.no_grad(), bank.batch(["a", "a", "a"]):
        torch.testing.assert_close(base(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_a_state_dict_brings_the_codes_back() -> None:
    model, other = Model(), Model()
    with torch.no_grad():
        other.up.weight.mul_(2)
    lk.quantize_(model)
    lk.quantize_(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(of(other.up).dense(), of(model.up).dense())


def test_a_state_of_another_format_is_refused() -> None:
    model, other = Model(), Model()
    lk.quantize_(model, "nf4", block_size=64)
    lk.quantize_(other, "fp4", block_size=64)
    with pytest.raises((RuntimeError, ValueError), match="expected a weight of"):
        other.load_state_dict(model.state_dict())


def test_a_cast_of_the_model_leaves_codes_and_scales() -> None:
    model = Model()
    lk.quantize_(model)
    before = of(model.up)
    model.to(torch.bfloat16)
    after = of(model.up)
    assert after.scales.dtype == torch.float32 and torch.equal(after.codes, before.codes)
    assert torch.equal(after.dense(), before.dense()) and model.up.bias.dtype == torch.bfloat16
    assert model(IDS).dtype == torch.bfloat16


def test_settings_reach_the_format() -> None:
    model = Model()
    lk.quantize_(model, "fp8", block=(32, 16))
    weight = of(model.up)
    assert isinstance(weight, FP8Weight) and weight.block == (32, 16)


def test_what_is_named_stays() -> None:
    model = Model()
    report = lk.quantize_(model, skip=["down"])
    assert type(model.down) is nn.Linear and ("down", "in skip") in [(s.name, s.reason) for s in report.skipped]


def test_merging_is_refused_and_changes_nothing() -> None:
    model = Model()
    lk.quantize_(model)
    lk.adapt(model, lk.LoRAConfig(r=4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"LoRALinear.merge_: expected a dense weight.*nf4"):
        model.up.merge_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]


WRONG: dict[str, tuple[Any, str]] = {
    "format": (lambda: lk.quantize_(Model(), "int3"), "expected format to be one of fp8, int8, mxfp4, nf4, fp4, got"),
    "dense": (lambda: lk.quantize_(Model(), "dense"), "expected format to be one of"),
    "model": (lambda: lk.quantize_(3), "expected model to be a torch.nn.Module, got int"),
    "nothing": (lambda: lk.quantize_(nn.Tanh()), "expected a model with an nn.Linear to replace"),
    "block": (lambda: lk.quantize_(Model(), block_size=3), "quantize_: up: NF4Weight.from_dense: expected block_size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_not_a_number_in_a_weight_is_named() -> None:
    model = Model()
    with torch.no_grad():
        model.down.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"quantize_: down: NF4Weight.from_dense: expected weight to hold finite"):
        lk.quantize_(model)
