"""XGBLoRA: what a round trains and what it leaves alone, L2, the end of the rounds, and resuming."""

from __future__ import annotations

import copy
import importlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.chain import XGBLoRA, cola, xgblora
from lowrank_kernels.optim import LoRAPro, LoRARITE, factor_groups

X, Y = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
DEPTH = 6


def adapted(r: int = 1, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(module for _ in range(DEPTH) for module in (nn.Linear(16, 16), nn.Tanh()))).to(dtype)
    lk.adapt(model, lk.LoRAConfig(r=r, alpha=2 * r))
    return model


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(factors(model), **{"lr": 0.02, "weight_decay": 0.1, **settings})


def start(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, **settings: Any) -> XGBLoRA:
    return xgblora(model, optimizer, steps, **{"share": 0.4, "seed": 3, **settings})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(X.to(model[0].weight.dtype)) - Y).square().mean().backward()
    optimizer.step()


def bits(chain: XGBLoRA) -> dict[str, tuple[bytes, ...]]:
    return {
        path: tuple(
            t.detach().view(torch.uint8).numpy().tobytes()
            for t in (layer.weight, layer.lora_A.weight, layer.lora_B.weight)
        )
        for path, layer in chain.layers.items()
    }


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_round_changes_its_own_layers_and_no_bit_of_the_others(set_to_none: bool) -> None:
    model = adapted()
    optimizer = adamw(model)
    chain = start(model, optimizer, warmup=1)
    seen = []
    for _ in range(6):
        drawn, before = set(chain.trained()), bits(chain)
        assert len(drawn) == 2  # 0.4 of 6, to the nearest
        for _ in range(4):
            (model(X) - Y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert chain.link_step == 0
        changed = {path for path, kept in bits(chain).items() if kept[0] != before[path][0]}
        assert changed == drawn
        fresh = set(chain.trained())
        assert all(bits(chain)[path] == before[path] for path in chain.layers if path not in drawn | fresh)
        assert not any(layer.lora_B.weight.any() for layer in chain.layers.values())
        assert not optimizer.state
        seen.append(drawn)
    assert len(set(map(frozenset, seen))) > 1


def test_layers_that_rest_get_no_gradient_and_no_state() -> None:
    model = adapted()
    optimizer = adamw(model)
    chain = start(model, optimizer)
    (model(X) - Y).square().mean().backward()
    for path, layer in chain.layers.items():
        assert (layer.lora_B.weight.grad is not None) == (path in chain.trained())
        assert layer.lora_A.weight.requires_grad and layer.lora_B.weight.requires_grad
    optimizer.step()
    assert len(optimizer.state) == 2 * len(set(chain.trained()))
    chain.detach()
    assert not any(layer.rests for layer in chain.layers.values())


def test_a_layer_with_hooks_rests_too() -> None:
    model = adapted()
    for module in model.modules():
        if isinstance(module, lk.nn.LoRALinear):
            module.lora_A.register_forward_hook(lambda *_: None)
    optimizer = adamw(model)
    chain = start(model, optimizer)
    before = bits(chain)
    step(model, optimizer)
    assert {path for path, kept in bits(chain).items() if kept != before[path]} == chain.trained()


def test_resting_layers_keep_nothing_of_x() -> None:
    kept: dict[float, int] = {}
    for share in (1.0, 0.01):
        model = adapted()
        start(model, adamw(model), share=share)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def keep(t: Tensor, sizes: dict[int, int] = sizes, own: set[int] = own) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(X)
        kept[share] = sum(sizes.values())
    assert kept[0.01] < kept[1.0]


@pytest.mark.parametrize("r", [1, 2])
def test_the_rank_of_the_update_is_at_most_r_a_round(r: int) -> None:
    model = adapted(r)
    before = {path: m.weight.detach().clone() for path, m in model.named_modules() if hasattr(m, "lora_A")}
    optimizer = adamw(model)
    chain = start(model, optimizer, rounds=5, share=0.5)
    for _ in range(20):
        step(model, optimizer)
    times = {path: sum(row[i] for row in chain.history["values"]) for i, path in enumerate(chain.layers)}
    assert sum(times.values()) == 5 * 3
    for path, layer in chain.layers.items():
        values = torch.linalg.svdvals((layer.weight - before[path]).double().detach())
        rank = times[path] * r
        assert not values[rank:].numel() or not times[path] or values[rank] < 1e-5 * values[0]
        assert bool(values.any()) == bool(times[path])


def test_after_the_last_round_nothing_trains_and_a_loss_still_has_a_backward() -> None:
    model = adapted()
    optimizer = adamw(model)
    chain = start(model, optimizer, rounds=2, warmup=3)
    for _ in range(8):
        step(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(9):
        step(model, optimizer)
    assert (chain.link, chain.link_step) == (2, 0) and chain.over and chain.warmup_factor() == 1.0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not optimizer.state and chain.history["steps"] == [1, 5]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("by", ["step", "closure", "scaler"])
def test_l2_is_in_the_gradient(fused: bool, by: str) -> None:
    """One step of SGD: A ← A - γ (∇A + l2 A), whoever computes the gradient and however it is scaled."""
    model = adapted()
    optimizer = torch.optim.SGD(factors(model), lr=0.1, fused=fused)
    chain = start(model, optimizer, share=1.0, l2=0.5)
    before = {path: layer.lora_A.weight.detach().clone() for path, layer in chain.layers.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=by == "scaler")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        scaler.scale(loss).backward()
        return loss.detach()

    if by == "closure":
        optimizer.step(closure)
    else:
        closure()
        scaler.step(optimizer)
    for path, layer in chain.layers.items():  # ∇A is zero while B is
        torch.testing.assert_close(layer.lora_A.weight.detach(), before[path] * (1 - 0.1 * 0.5))
        assert layer.lora_B.weight.any()


MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "fused": lambda model: adamw(model, fused=True),
    "rite": lambda model: LoRARITE(factor_groups(model), lr=1e-2),
    "pro": lambda model: LoRAPro(factor_groups(model), lr=1e-3),
}


@pytest.mark.parametrize("steps", [6, 8], ids=["within a round", "at a round's end"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("adamw", {}), ("fused", {"warmup": 2}), ("rite", {}), ("pro", {"l2": 0.0}), ("adamw", {"rounds": 2})],
)
@pytest.mark.parametrize("made", ["before loading", "after loading"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(made: str, kind: str, settings: Any, steps: int) -> None:
    model = adapted()
    optimizer = MAKE[kind](model)
    chain = start(model, optimizer, **settings)
    for _ in range(steps):
        step(model, optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = adapted()
    other = MAKE[kind](again)
    if made == "before loading":
        resumed = start(again, other, **settings)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    if made == "after loading":
        resumed = start(again, other, **settings)
    torch.manual_seed(99)
    for _ in range(7):
        step(model, optimizer)
        step(again, other)
    assert (resumed.link, resumed.link_step, resumed.history) == (chain.link, chain.link_step, chain.history)
    for (name, p), q in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("settings", [{"rounding": "stochastic"}, {"master": True}], ids=str)
def test_over_bfloat16_weights(settings: dict[str, Any]) -> None:
    model = adapted(dtype=torch.bfloat16)
    optimizer = adamw(model)
    chain = start(model, optimizer, **settings)
    drawn, before = set(chain.trained()), bits(chain)
    for _ in range(4):
        step(model, optimizer)
    assert {path for path, kept in bits(chain).items() if kept[0] != before[path][0]} <= drawn


def test_a_correction_that_was_there_is_kept_wherever_it_is() -> None:
    model = adapted()
    for module in model.modules():
        if isinstance(module, lk.nn.LoRALinear):
            nn.init.normal_(module.lora_B.weight, std=0.1)
    wanted = model(X)
    chain = start(model, adamw(model))
    assert torch.equal(model(X), wanted)
    chain.next_link()
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
    assert not any(layer.lora_B.weight.any() for layer in chain.layers.values())


def test_factors_that_are_not_finite_stop_a_round_before_any_weight_changes() -> None:
    model = adapted()
    optimizer = adamw(model)
    chain = start(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    path = sorted(chain.trained())[0]
    before = {name: kept[0] for name, kept in bits(chain).items()}
    chain.layers[path].lora_B.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=f"xgblora: expected finite factors at the end of link 0, .* in .*{path}"):
        step(model, optimizer)
    assert {name: kept[0] for name, kept in bits(chain).items()} == before


def test_copies_take_a_chain_of_their_own_and_states_of_other_chains_are_refused() -> None:
    model = adapted()
    optimizer = adamw(model)
    start(model, optimizer)
    twin, other = copy.deepcopy((model, optimizer))
    assert any(layer.rests for layer in model.modules() if isinstance(layer, lk.nn.LoRALinear))
    assert not any(layer.rests for layer in twin.modules() if isinstance(layer, lk.nn.LoRALinear))
    assert start(twin, other).link == 0
    plain = adapted()
    state = cola(plain, opt := adamw(plain), 4) and opt.state_dict()
    with pytest.raises(ValueError, match="xgblora: expected a state of its own, got that of another chain"):
        optimizer.load_state_dict(state)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"share": v}, TypeError, "share to be a number") for v in (None, True, "0.3")),
    *(({"share": v}, ValueError, "share above 0 and of at most 1") for v in (0, 0.0, -0.1, 1.01, math.nan, math.inf)),
    *(({"l2": v}, TypeError, "l2 to be a number") for v in (None, True, "0")),
    *(({"l2": v}, ValueError, "l2 to be finite") for v in (-1e-9, math.nan, math.inf)),
    *(({"rounds": v}, TypeError, "rounds to be an integer or None") for v in (1.0, True, "2")),
    *(({"rounds": v}, ValueError, "rounds of at least 1") for v in (0, -1)),
    ({"steps": 0}, ValueError, "steps_per_link of at least 1"),
    ({"init": "zero"}, ValueError, "init to be one of"),
]


@pytest.mark.parametrize(("settings", "error", "message"), WRONG, ids=str)
def test_a_wrong_argument_is_refused_by_name_and_nothing_is_touched(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = adapted()
    optimizer = adamw(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=f"xgblora: expected {message}"):
        start(model, optimizer, **settings)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(getattr(m, "rests", False) for m in model.modules())
    assert "chain" not in optimizer.state_dict()["param_groups"][0]


def test_rounds_of_rank_1_beat_one_lora_of_rank_1_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "methods"))
    digits = importlib.import_module("digits")
    base = digits.pretrained(0)
    accuracy = {method: digits.tune(method, base, 0) for method in ("xgblora", "lora")}
    assert accuracy["xgblora"] > accuracy["lora"] + 5, accuracy
