"""LoRA-GA's start in any order of events: W comes back, and no file is written that does not fit the base."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.chain import cola
from lowrank_kernels.init import estimate_gradients, init_factors_, lora_ga_, lora_ga_factors

X, Y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.ones(8, 24)
CONFIG = lk.LoRAConfig(r=4)


def base_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24)).to(dtype)


def loss(model: nn.Sequential, _: Any) -> torch.Tensor:
    return (model(X.to(model[0].weight.dtype)).float() - Y).square().mean()


def gradients(config: lk.AdapterConfig = CONFIG) -> dict[str, torch.Tensor]:
    base = base_model()
    return estimate_gradients(base, [0], loss, lk.plan_adaptation(base, config).targets)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, 0).backward()
        optimizer.step()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", [lk.LoRAConfig, lk.DoRAConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_undo_puts_the_weight_back(dtype: torch.dtype, kind: type[lk.LoRAConfig], trained: bool, merged: bool) -> None:
    model, wanted = base_model(dtype), base_model(dtype)
    report = lk.adapt(model, kind(r=4))
    lora_ga_(model, gradients())
    shift = (model[0].weight - wanted[0].weight).abs().max()
    if trained:
        train(model)
    if merged:
        model[0].merge_()
    report.undo()
    assert type(model[0]) is nn.Linear
    # A rounding out and a rounding back; a merge of what was trained in between rounds twice more.
    size = float(model[0].weight.abs().max() + shift) + (2.0 if trained and merged else 0.0)
    allowed = 2.0 * size * torch.finfo(dtype).eps
    torch.testing.assert_close(model[0].weight, wanted[0].weight, rtol=0, atol=allowed)


def test_undo_after_a_copy_puts_each_back_by_itself() -> None:
    model, wanted = base_model(), base_model()
    report = lk.adapt(model, CONFIG)
    lora_ga_(model, gradients())
    twin = copy.deepcopy(model)
    report.undo()
    torch.testing.assert_close(model[0].weight, wanted[0].weight)
    torch.testing.assert_close(twin(X), wanted(X), rtol=1e-5, atol=1e-5)


def test_a_second_start_is_refused_and_changes_nothing() -> None:
    model = base_model()
    lk.adapt(model, CONFIG)
    found = gradients()
    lora_ga_(model, found)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="lora_ga: expected factors that hold no correction yet, got trained or started"
    ):
        lora_ga_(model, found)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_trained_adapter_is_not_started_over() -> None:
    model = base_model()
    lk.adapt(model, CONFIG)
    train(model)
    trained = model(X)
    with pytest.raises(ValueError, match="lora_ga: expected factors that hold no correction yet"):
        lora_ga_(model, gradients())
    assert torch.equal(model(X), trained)


def test_after_undo_it_starts_again() -> None:
    model, wanted = base_model(), base_model()
    for _ in range(2):
        report = lk.adapt(model, CONFIG)
        lora_ga_(model, gradients())
        torch.testing.assert_close(model(X), wanted(X), rtol=1e-5, atol=1e-5)
        report.undo()
    torch.testing.assert_close(model[0].weight, wanted[0].weight)


@pytest.mark.parametrize("copied", [False, True])
def test_save_adapter_refuses_a_started_model_and_names_what_fits(copied: bool, tmp_path: Path) -> None:
    model = base_model()
    lk.adapt(model, CONFIG)
    starts = lora_ga_(model, gradients())
    train(model)
    model = copy.deepcopy(model) if copied else model
    with pytest.raises(
        ValueError, match=r"save_adapter: expected layers over the base's own .*lk.save_lora_ga_adapter"
    ):
        lk.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    lk.save_lora_ga_adapter(model, starts, tmp_path / "a")
    other = base_model()
    lk.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(X), model(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resumed", [False, True])
def test_no_adapter_is_written_of_a_model_that_a_chain_merged_into(resumed: bool, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any, Any]:
        model = base_model()
        lk.adapt(model, CONFIG)
        starts = lora_ga_(model, gradients())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return model, optimizer, starts, cola(model, optimizer, 5)

    model, optimizer, starts, chain = make()
    chain.next_link()
    if resumed:
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, optimizer, starts, chain = make()
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    with pytest.raises(ValueError, match=r"save_adapter: expected .* changed by a chain, .* save the model instead"):
        lk.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"save_lora_ga_adapter: expected .* changed by a chain"):
        lk.save_lora_ga_adapter(model, starts, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_merging_and_unmerging_a_started_model_keeps_the_function() -> None:
    model = base_model()
    lk.adapt(model, CONFIG)
    lora_ga_(model, gradients())
    train(model)
    wanted = model(X)
    for call in (model[0].merge_, model[0].unmerge_):
        call()
        torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-4)


def started(config: lk.AdapterConfig = CONFIG, found: Any = None, **settings: Any) -> Callable[[], object]:
    def call() -> object:
        model = base_model()
        lk.adapt(model, config)
        return lora_ga_(model, gradients() if found is None else found, **settings)

    return call


NOT_FLOATS = {"0": torch.ones(24, 16, dtype=torch.int64)}
NO_ALPHA = lk.LoRAConfig(r=4, alpha=0)
G = torch.ones(24, 16)
WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (started(NO_ALPHA, scale="gd"), ValueError, "scaling other than 0 for scale='gd', .* got 0.0; .*; layer 0"),
    (started(NO_ALPHA, scale="weight_svd"), ValueError, "scaling above 0 for scale='weight_svd'"),
    (started(lk.LoRAConfig(r=4, alpha=-1), scale="weight_svd"), ValueError, "scaling above 0"),
    *((started(gamma=v), ValueError, "gamma") for v in (0.0, -1.0, math.nan, math.inf, None, "16", True)),
    *((started(seed=v), TypeError, "seed") for v in (None, 0.5, True)),
    *((started(direction=v), ValueError, "direction") for v in (None, "up", 1)),
    *((started(scale=v), ValueError, "scale") for v in (None, "big", 1.0)),
    (started(found=[G]), TypeError, "gradients"),
    (started(found={"0": None}), TypeError, "gradients"),
    (started(found=NOT_FLOATS), TypeError, "gradient to be a matrix .*; layer 0"),
    (started(lk.MultiLoRAConfig(ranks=(2,))), ValueError, "a model with LoRALinear layers, found none"),
    (lambda: lora_ga_({}, {}), TypeError, "model"),
    *((lambda v=v: lora_ga_factors(G, v), TypeError, "r to be") for v in (2.0, None, True)),
    *((lambda v=v: lora_ga_factors(G, v), ValueError, "a rank") for v in (0, -1, 9)),
    *((lambda v=v: lora_ga_factors(G, 2, scaling=v), ValueError, "scaling") for v in (math.nan, None, "1", True)),
    *((lambda v=v: lora_ga_factors(v, 2), TypeError, "gradient") for v in (None, G[0], G.int())),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_a_wrong_argument_is_refused_by_name(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"lora_ga: expected {message}"):
        call()


@pytest.mark.parametrize(
    ("loss_of", "linears", "message"),
    [
        (lambda m, _: 1.0, None, "loss to return a scalar tensor, got 1.0"),
        (lambda m, _: m(X), None, "loss to return a scalar tensor"),
        (loss, [nn.Linear(2, 2)], "linears to be a dict"),
        (loss, {"0": nn.Conv1d(1, 1, 1)}, "linears to be a dict of path to nn.Linear"),
    ],
)
def test_a_wrong_estimate_is_refused_by_name(loss_of: Any, linears: Any, message: str) -> None:
    base = base_model()
    with pytest.raises(TypeError, match=f"estimate_gradients: expected {message}"):
        estimate_gradients(base, [0], loss_of, {"0": base[0]} if linears is None else linears)
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


A, B = torch.ones(2, 5), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(((A, B, v), "init to be one of") for v in (None, "pissa", ["kaiming"])),
        ((None, B), "lora_a to be a matrix of floats"),
        ((A, B[0]), "lora_b to be a matrix of floats"),
        ((A.int(), B), "lora_a to be a matrix of floats"),
        ((A, B.T), "lora_a .* and lora_b .* of one rank"),
    ],
)
def test_wrong_factors_to_sample_are_refused_by_name(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"init_factors_: expected {message}"):
        init_factors_(*arguments)
    assert A.eq(1).all() and B.eq(1).all()
