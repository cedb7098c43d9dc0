"""Chains in any order of events: nothing that was trained is lost, nothing is counted that did not happen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.chain import cola, rac_lora
from lowrank_kernels.init import estimate_gradients, lora_ga_
from lowrank_kernels.optim import LoRARITE, factor_groups

X, Y = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))


def adapted(train: str = "both", r: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    lk.adapt(model, lk.LoRAConfig(r=r, train=train))
    return model


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **settings)


def rite(model: nn.Module) -> torch.optim.Optimizer:
    return LoRARITE(factor_groups(model), lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
    (model(X.to(model[0].weight.dtype)) - Y).square().mean().mul(scale).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [6, 8], ids=["within a link", "at a link's end"])
@pytest.mark.parametrize(
    ("train", "make", "settings"),
    [
        ("both", adamw, {}),
        ("both", rite, {"warmup": 2}),
        ("b", adamw, {"master": True}),
        ("a", adamw, {}),
    ],
)
def test_a_chain_made_after_loading_goes_on_bit_for_bit(
    train: str, make: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], steps: int
) -> None:
    dtype = torch.bfloat16 if settings.get("master") else torch.float32
    method = cola if train == "both" else rac_lora

    def fresh() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = adapted(train, dtype=dtype)
        return model, make(model)

    model, optimizer = fresh()
    chain = method(model, optimizer, 4, **settings)
    for _ in range(steps):
        step(model, optimizer)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, other = fresh()
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    resumed = method(again, other, 4, **settings)
    assert torch.equal(again(X.to(dtype)), model(X.to(dtype)))
    assert (resumed.link, resumed.link_step) == (chain.link, chain.link_step) == divmod(steps, 4)
    for _ in range(5):
        step(model, optimizer)
        step(again, other)
    for (name, p), q in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_states_load_in_either_order_also_before_the_chain_and_after() -> None:
    model = adapted()
    optimizer = adamw(model)
    cola(model, optimizer, 4, ranks=(4, 2))
    for _ in range(6):
        step(model, optimizer)
    wanted, states = model(X), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for first in (0, 1):
        again = adapted()
        other = adamw(again)
        chain = cola(again, other, 4, ranks=(4, 2))
        for which in (first, 1 - first):
            (again, other)[which].load_state_dict(states[which])
        assert torch.equal(again(X), wanted) and chain.link == 1 and again[0].r == 2


def test_a_state_with_the_chain_beside_the_groups_still_loads() -> None:
    model = adapted()
    optimizer = adamw(model)
    chain = cola(model, optimizer, 4)
    state = optimizer.state_dict()
    state["chain"] = {**state["param_groups"][0].pop("chain"), "link": 7}
    optimizer.load_state_dict(state)
    assert chain.link == 7


def test_a_state_that_is_refused_leaves_the_chain_where_it_was() -> None:
    model = adapted()
    optimizer = adamw(model)
    chain = cola(model, optimizer, 4, ranks=(4, 2))
    step(model, optimizer)
    before, state = model(X), optimizer.state_dict()
    state["param_groups"][0]["chain"] = {**state["param_groups"][0]["chain"], "link": 3}
    state["param_groups"][0]["params"] = [0]  # of another optimizer
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(state)
    assert chain.link == 0 and torch.equal(model(X), before)


@pytest.mark.parametrize("train", ["both", "a", "b"])
def test_a_trained_adapter_is_the_first_link(train: str) -> None:
    model = adapted(train)
    optimizer = adamw(model)
    for _ in range(3):
        step(model, optimizer)
    trained, moments = model(X), len(optimizer.state)
    chain = (cola if train == "both" else rac_lora)(model, optimizer, 4)
    assert torch.equal(model(X), trained) and len(optimizer.state) == moments and chain.link == 0
    chain.next_link()
    torch.testing.assert_close(model(X), trained, rtol=1e-5, atol=1e-5)
    assert chain.link == 1


def test_ranks_that_a_trained_adapter_does_not_have_are_refused() -> None:
    model = adapted()
    optimizer = adamw(model)
    nn.init.normal_(model[0].lora_B.weight)
    before = model(X)
    with pytest.raises(
        ValueError, match="cola: expected factors that hold a correction to have link 0's rank of 2, got"
    ):
        cola(model, optimizer, 4, ranks=(2, 1))
    assert torch.equal(model(X), before) and "chain" not in optimizer.state_dict()["param_groups"][0]


def test_a_chain_over_lora_gas_start_merges_it_back() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16))
    config = lk.LoRAConfig(r=4)
    found = estimate_gradients(
        base, [0], lambda m, _: (m(X) - Y).square().mean(), lk.plan_adaptation(base, config).targets
    )
    wanted, weight = base(X), base[0].weight.detach().clone()
    report = lk.adapt(base, config)
    lora_ga_(base, found)
    chain = cola(base, adamw(base), 4)
    torch.testing.assert_close(base(X), wanted, rtol=1e-5, atol=1e-5)
    chain.next_link()
    torch.testing.assert_close(base[0].weight, weight, rtol=1e-5, atol=1e-5)
    report.undo()  # the start is in W again, and is not put back a second time
    torch.testing.assert_close(base[0].weight, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("settings", [{"fused": False, "foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_that_a_grad_scaler_skipped_does_not_count(settings: dict[str, bool], warmup: int) -> None:
    model = adapted()
    optimizer = adamw(model, **settings)
    chain = cola(model, optimizer, 3, warmup=warmup)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    taken = 0
    for i in range(14):
        finite = i % 3 == 2
        loss = (model(X) - Y).square().mean() * (1.0 if finite else float("inf"))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken += finite
        assert (chain.link, chain.link_step) == divmod(taken, 3)
        assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("scheduler", [None, "before", "after"])
@pytest.mark.parametrize("by", ["closure", "hook", "step"])
def test_a_step_that_raises_leaves_the_rate_as_it_was(by: str, scheduler: str | None) -> None:
    model = adapted()
    optimizer = adamw(model)
    if scheduler == "before":
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)
    chain = cola(model, optimizer, 5, warmup=3)
    if scheduler == "after":
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)
    for _ in range(5):
        step(model, optimizer)

    def fail(*_: Any) -> None:
        assert optimizer.param_groups[0]["lr"] < 0.05  # within the warm-up
        raise RuntimeError("out of memory")

    handle = optimizer.register_step_pre_hook(fail) if by == "hook" else None
    for _ in range(3):
        if by == "step":
            model[0].lora_A.weight.grad = torch.full((4, 16), 1.0)
            optimizer.state[model[0].lora_A.weight] = {"step": None}
        with pytest.raises((RuntimeError, KeyError, AttributeError, TypeError)):
            optimizer.step(fail) if by == "closure" else optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.05 and (chain.link, chain.link_step) == (1, 0)
    if handle is not None:
        handle.remove()
    optimizer.state.clear()
    step(model, optimizer)
    assert chain.link_step == 1 and optimizer.param_groups[0]["lr"] == 0.05


def test_a_chain_that_is_detached_leaves_room_for_another() -> None:
    model = adapted()
    optimizer = adamw(model)
    first = cola(model, optimizer, 2, warmup=1)
    step(model, optimizer)
    first.detach()
    second = cola(model, optimizer, 3)
    for _ in range(3):
        step(model, optimizer)
    assert (first.link, second.link) == (0, 1)


def test_copies_of_model_and_optimizer_take_a_chain_of_their_own() -> None:
    model = adapted()
    optimizer = adamw(model)
    cola(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    assert cola(twin, other, 2).link == 0


def test_a_merged_layer_stops_a_link_before_it_changes_anything() -> None:
    model = adapted()
    chain = cola(model, adamw(model), 2)
    nn.init.normal_(model[0].lora_B.weight)
    wanted = model(X)
    model[0].merge_()
    before: Tensor = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="cola: expected layers that are not merged at the end of link 0, got 0"):
        chain.next_link()
    assert torch.equal(model[0].weight, before)
    model[0].unmerge_()
    chain.next_link()
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-4)


def start(method: Callable[..., Any] = cola, **settings: Any) -> Any:
    model = adapted("both" if method is cola else "b")
    optimizer = settings.pop("optimizer", adamw)(model)
    return method(model, optimizer, **{"steps_per_link": 2, **settings})


def test_a_second_chain_on_an_optimizer_is_refused_and_the_first_goes_on() -> None:
    model = adapted()
    optimizer = adamw(model)
    first = cola(model, optimizer, 2)
    with pytest.raises(ValueError, match="cola: expected an optimizer without a chain"):
        cola(model, optimizer, 3)
    for _ in range(2):
        step(model, optimizer)
    assert first.link == 1


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"steps_per_link": v}, TypeError, "steps_per_link") for v in (2.5, True, None, "2")),
    *(({"steps_per_link": v}, ValueError, "steps_per_link") for v in (0, -1)),
    *(({"warmup": v}, TypeError, "warmup") for v in (1.0, True, None)),
    *(({"warmup": v}, ValueError, "warmup") for v in (-1, 3)),
    *(({"seed": v}, TypeError, "seed") for v in (0.5, None, True)),
    *(({"init": v}, ValueError, "init") for v in ("zero", None, 3, "pissa")),
    *(({"ranks": v}, TypeError, "ranks") for v in (4, "42", (2.0,), (True,), (None,))),
    *(({"ranks": v}, ValueError, "ranks") for v in ((), (0,), (5,))),
    *(({"rounding": v}, ValueError, "rounding") for v in ("up", None, "stochastic")),
    *(({"master": v}, TypeError, "master") for v in (1, None)),
    ({"optimizer": lambda m: None}, TypeError, "optimizer"),
    ({"optimizer": lambda m: torch.optim.SGD([m[0].lora_A.weight], lr=1.0)}, ValueError, "optimizer"),
    ({"optimizer": lambda m: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)}, ValueError, "optimizer"),
    ({"optimizer": lambda m: torch.optim.LBFGS(m.parameters())}, ValueError, "an optimizer .* got LBFGS"),
]


@pytest.mark.parametrize("method", [cola, rac_lora])
@pytest.mark.parametrize(("settings", "error", "message"), WRONG)
def test_a_wrong_argument_is_refused_by_name(
    method: Callable[..., Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{method.__name__}: expected .*{message}"):
        start(method, **settings)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cola: expected model to be a torch.nn.Module, got dict"):
        cola({}, adamw(adapted()), 2)
