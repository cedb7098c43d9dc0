"""Every setting of every optimizer of this package: in its range, or refused by its name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.optim import BlockAdamW, LoRAPro, LoRARITE, factor_groups, lora_plus, lora_plus_groups


def lora_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4))
    lk.adapt(model, lk.LoRAConfig(r=2))
    return model


def block_model() -> nn.Sequential:
    index = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    layers = [lk.nn.BlockSparseLinear.from_linear(nn.Linear(32, 32), index, 16) for _ in range(2)]
    return nn.Sequential(*layers).requires_grad_(False)


def block_adamw(**settings: Any) -> BlockAdamW:
    model = block_model()
    for layer in model:
        layer.blocks.requires_grad_(True)
    return BlockAdamW(model, **settings)


MAKERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "LoRAPro": (
        lambda **s: LoRAPro(factor_groups(lora_model()), **s),
        ("lr", "momentum", "adam_eps", "eps", "weight_decay"),
    ),
    "LoRARITE": (lambda **s: LoRARITE(factor_groups(lora_model()), **s), ("lr", "eps", "adam_eps", "weight_decay")),
    "BlockAdamW": (block_adamw, ("lr", "eps", "weight_decay")),
    "lora_plus_groups": (
        lambda **s: lora_plus_groups(lora_model(), **{"lr": 1e-3, **s}),
        ("lr", "ratio", "embedding_lr", "weight_decay"),
    ),
}
WRONG = [math.nan, math.inf, -1.0, None, "1e-3", True, [0.1], 1j]
BETAS = [0.9, None, (0.9,), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), ("0.9", 0.9), (True, 0.9), (0.9, 0.9, 0.9)]
NUMBERS = [(op, name, value) for op, (_, names) in MAKERS.items() for name in names for value in WRONG]
NUMBERS += [(op, "betas", value) for op in ("LoRAPro", "LoRARITE", "BlockAdamW") for value in BETAS]
NUMBERS += [("LoRAPro", "momentum", 1.0), ("LoRAPro", "moments", "some"), ("LoRAPro", "moments", None)]
NUMBERS += [("BlockAdamW", "seed", 0.5), ("BlockAdamW", "stochastic_rounding", 1)]


@pytest.mark.parametrize(("op", "name", "value"), NUMBERS)
def test_a_wrong_setting_is_refused_by_name(op: str, name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{op}: expected {name}\b"):
        MAKERS[op][0](**{name: value})


@pytest.mark.parametrize("op", ["LoRAPro", "LoRARITE"])
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("lr", "eps", "damping", "weight_decay") for value in WRONG]
    + [("betas", value) for value in BETAS]
    + [("scaling", value) for value in ([math.nan], [1e39], [None], [True], 1.0, [1.0, 1.0])],
)
def test_a_refused_group_is_not_added(op: str, name: str, value: Any) -> None:
    optimizer = MAKERS[op][0]()
    pair = [nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(4, 2))]
    with pytest.raises((ValueError, TypeError), match=rf"^{op}: expected .*\b{name}\b"):
        optimizer.add_param_group({"params": pair, "scaling": [1.0], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: factor_groups([lora_model()]), "factor_groups: expected model to be a torch.nn.Module, got list"),
        (lambda: lora_plus_groups(None, 1e-3), "lora_plus_groups: expected model to be a torch.nn.Module"),
        (lambda: BlockAdamW({}), "BlockAdamW: expected model to be a torch.nn.Module, got dict"),
        (lambda: lora_plus(lora_model(), 1e-3, optimizer="adamw"), "lora_plus: expected optimizer to be a class"),
        (lambda: LoRARITE([{"params": [1, 2], "scaling": [1.0]}]), "LoRARITE: expected params to be tensors, got int"),
    ],
)
def test_what_is_no_model_or_optimizer_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_block_adamw_takes_no_further_group() -> None:
    optimizer = block_adamw()
    with pytest.raises(ValueError, match="BlockAdamW: expected no group beside the model's blocks in add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def test_a_copy_of_block_adamw_steps_the_copy_of_its_model() -> None:
    model = block_model()
    for layer in model:
        layer.blocks.requires_grad_(True)
    ours = (model, BlockAdamW(model))
    twin = copy.deepcopy(ours)
    for m, optimizer in (ours, twin):
        m(torch.ones(3, 32)).square().sum().backward()
        optimizer.step()
    for layer, other in zip(ours[0], twin[0], strict=True):
        assert torch.equal(layer.blocks, other.blocks) and torch.equal(layer.weight, other.weight)


def test_magnitudes_of_many_adapters_are_vectors() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    lk.adapt(model, lk.MultiLoRAConfig(ranks=(2, 3), dora=True))
    groups = {g["name"]: g for g in lora_plus_groups(model, 1e-3, ratio=8, weight_decay=0.1)}
    assert groups["vectors"]["params"] == [model[0].lora_magnitude]
    assert (groups["vectors"]["lr"], groups["vectors"]["weight_decay"]) == (8e-3, 0.0)
    assert groups["A"]["params"] == [model[0].lora_A] and groups["B"]["params"] == [model[0].lora_B]


@pytest.mark.parametrize("convolution", [False, True])
def test_magnitudes_of_a_peft_model_are_vectors(convolution: bool) -> None:
    peft = pytest.importorskip("peft")
    layer = nn.Conv2d(3, 6, 3) if convolution else nn.Linear(3, 6)
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["0"], modules_to_save=["1"], bias="all")
    model = peft.get_peft_model(nn.Sequential(layer, nn.Linear(6, 6)), config)
    groups = {g["name"]: g for g in lora_plus_groups(model, 1e-3)}
    names = {id(p): n for n, p in model.named_parameters()}
    found = {name: sorted(names[id(p)] for p in group["params"]) for name, group in groups.items()}
    assert any("lora_magnitude_vector" in n for n in found["vectors"])
    assert all("lora_magnitude" in n or n.endswith("bias") for n in found["vectors"])
    assert [n for n in found["A"] if "lora_A" not in n] == [n for n in found["A"] if "modules_to_save" in n]
    assert all("lora_B" in n for n in found["B"])
