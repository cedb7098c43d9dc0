"""LoRA-GA: the gradient estimate, the directions and scales, the start, and the exported adapter."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.init import estimate_gradients, lora_ga_, lora_ga_factors
from lowrank_kernels.init.lora_ga import DIRECTIONS

F64 = torch.float64
N, K, R = 40, 30, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two, self.head = (
            nn.Embedding(9, 16),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            nn.Linear(16, 9),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids) + self.two(torch.tanh(self.one(self.embed(ids)))))


def cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch), (batch + 1) % 9)


CONFIG = lk.LoRAConfig(r=3, alpha=6, target_modules=("one", "two"))
BATCHES = [torch.arange(9), torch.arange(0, 8, 2), torch.arange(1, 9, 3)]


def model_and_linears() -> tuple[Model, dict[str, nn.Linear]]:
    torch.manual_seed(0)
    model = Model()
    return model, lk.plan_adaptation(model, CONFIG).targets


def test_the_estimate_is_the_mean_gradient_and_leaves_no_trace() -> None:
    model, linears = model_and_linears()
    model.embed.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    alive = []

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        assert not m.get_submodule("head").weight.requires_grad
        # Autograd reaches `one` last: whatever still has a gradient then was not freed.
        m.get_submodule("one").weight.register_hook(
            lambda g: alive.append([p for p in m.parameters() if p.grad is not None])
        )
        return cross_entropy(m, batch)

    found = estimate_gradients(model, BATCHES, loss, linears)
    assert alive and not any(alive)
    assert model.head.weight.requires_grad and not model.embed.weight.requires_grad
    assert model.head.weight.grad is not None and model.one.weight.grad is None
    for name, linear in linears.items():
        wanted = [torch.autograd.grad(cross_entropy(model, batch), linear.weight)[0] for batch in BATCHES]
        torch.testing.assert_close(found[name], torch.stack(wanted).mean(0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_unit_scale_gives_the_best_approximation_of_rank_2r(direction: str) -> None:
    g = torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(0))
    a, b = lora_ga_factors(g, R, direction=direction, scale="unit")
    eye = torch.eye(R, dtype=F64)
    torch.testing.assert_close(a @ a.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.T @ b, eye, rtol=0, atol=1e-12)
    tail = torch.linalg.svdvals(g)[2 * R :].norm()
    error = (g - (g @ a.T @ a + b @ b.T @ g)).norm()
    assert abs(error - tail) < 1e-12 * g.norm()


def test_directions_take_the_columns_that_they_say() -> None:
    values = torch.tensor([9.0, 7, 5, 3, 2, 1], dtype=F64)
    g = torch.diag(values)  # singular vectors are the unit vectors, in order
    for direction, for_a, for_b in (("ArB2r", (0, 1), (2, 3)), ("A2rBr", (2, 3), (0, 1)), ("ArBr", (1, 3), (0, 2))):
        a, b = lora_ga_factors(g, 2, direction=direction, scale="unit")
        assert a.abs().argmax(1).tolist() == list(for_a), direction
        assert b.abs().argmax(0).tolist() == list(for_b), direction
    split = lora_ga_factors(g, 2, direction="random", scale="unit", seed=5)
    columns = split[0].abs().argmax(1).tolist() + split[1].abs().argmax(0).tolist()
    assert sorted(columns) == [0, 1, 2, 3]
    again = lora_ga_factors(g, 2, direction="random", scale="unit", seed=5)
    assert all(torch.equal(x, y) for x, y in zip(split, again, strict=True))


def test_scales() -> None:
    g, w = torch.randn(2, N, K, dtype=F64, generator=torch.Generator().manual_seed(0))
    unit_a, unit_b = lora_ga_factors(g, R, scale="unit")
    singular = torch.linalg.svdvals(w)[:R].mean().item()
    for scale, factor in (
        ("stable", N**0.25 / 8.0),
        ("gd", 1 / 0.5),
        ("weight_svd", math.sqrt(singular / 0.5)),
    ):
        a, b = lora_ga_factors(g, R, scale=scale, gamma=64.0, scaling=0.5, weight=w)
        torch.testing.assert_close(a, factor * unit_a)
        torch.testing.assert_close(b, factor * unit_b)


def test_the_randomised_svd_finds_the_same_and_is_seeded() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=generator))[0] for n in (60, 2100))
    g = u * 0.8 ** torch.arange(60) @ v.T  # falls off slowly: not without power iterations
    drawn = torch.get_rng_state()
    a, b = lora_ga_factors(g, 3, scale="unit", seed=1)
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.manual_seed(99)
    again = lora_ga_factors(g, 3, scale="unit", seed=1)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    error = (g - (g @ a.T @ a + b @ b.T @ g)).norm()
    assert error < 1.01 * torch.linalg.svdvals(g)[6:].norm()


class Started(NamedTuple):
    """A model that LoRA-GA has given its start, and the one it came from."""

    model: Model
    base: Model
    starts: Any
    layers: tuple[str, ...]


@pytest.fixture(params=[False, True], ids=["plain", "rslora"])
def started(request: pytest.FixtureRequest) -> Started:
    model, linears = model_and_linears()
    base = copy.deepcopy(model)
    gradients = estimate_gradients(model, BATCHES, cross_entropy, linears)
    config = lk.LoRAConfig(
        r=3,
        alpha=6,
        target_modules=("one", "two"),
        rslora=request.param,
        rank_pattern={"two": 2},
        alpha_pattern={"two": 5},
    )
    lk.adapt(model, config)
    return Started(model, base, lora_ga_(model, gradients), tuple(linears))


def train_for(model: nn.Module, steps: int) -> list[float]:
    """The losses."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model, BATCHES[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_start_is_the_pretrained_function(started: Started) -> None:
    for name in started.layers:
        layer = started.model.get_submodule(name)
        assert layer.lora_B.weight.abs().max() > 0
        start = layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        torch.testing.assert_close(start, started.base.get_submodule(name).weight, rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(started.model(BATCHES[0]), started.base(BATCHES[0]), rtol=1e-5, atol=1e-6)


def test_training_from_the_start_lowers_the_loss(started: Started) -> None:
    losses = train_for(started.model, 20)
    assert losses[-1] < 0.8 * losses[0]


def test_the_export_fits_the_untouched_base(started: Started, tmp_path: Path) -> None:
    model, base, starts, _ = started
    train_for(model, 20)
    lk.save_lora_ga_adapter(model, starts, tmp_path / "adapter")
    report = lk.load_adapter(base, tmp_path / "adapter")
    assert {r.name: r.rank for r in report.replaced} == {"one": 6, "two": 4}
    torch.testing.assert_close(base(BATCHES[0]), model(BATCHES[0]), rtol=1e-4, atol=1e-5)


def test_peft_reads_the_export(started: Started, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, base, starts, _ = started
    train_for(model, 20)
    lk.save_lora_ga_adapter(model, starts, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(BATCHES[0]), model(BATCHES[0]), rtol=1e-4, atol=1e-5)


def nan_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return cross_entropy(model, batch) * float("nan")


def nan_gradient(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.where(torch.tensor(True), cross_entropy(model, batch), (model(batch) * 0).sum().sqrt())


def loss_of_nothing(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.zeros(())


def loss_of_one(model: Model, batch: Tensor) -> Tensor:
    return model.one(model.embed(batch)).square().sum()


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], cross_entropy, "expected at least one batch, got none"),
        (BATCHES, nan_loss, "expected a finite loss of the weights"),
        (BATCHES, nan_gradient, "expected a finite gradient of one, but got NaN"),
        (BATCHES, loss_of_nothing, "expected a finite loss of the weights"),
        (BATCHES, loss_of_one, "expected a finite gradient of two, but the loss does not reach it"),
    ],
)
def test_bad_estimates(batches, loss, message) -> None:  # type: ignore[no-untyped-def]
    model, linears = model_and_linears()
    with pytest.raises(ValueError, match=f"estimate_gradients: {message}"):
        estimate_gradients(model, batches, loss, linears)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(ValueError, match="expected linears"):
        estimate_gradients(model, batches, loss, {})


GRADIENTS = {"one": torch.randn(24, 16), "two": torch.randn(16, 24)}


@pytest.mark.parametrize(
    ("gradients", "settings", "config", "message"),
    [
        ({"one": GRADIENTS["one"]}, {}, {}, r"gradient of shape \(N, K\) = \(16, 24\) for two, got none"),
        ({**GRADIENTS, "two": torch.zeros(24, 16)}, {}, {}, r"for two, got one of shape \(24, 16\)"),
        ({**GRADIENTS, "two": torch.full((16, 24), math.nan)}, {}, {}, "a finite gradient, got NaN or Inf; layer two"),
        ({**GRADIENTS, "two": torch.zeros(16, 24)}, {}, {}, "not zero throughout; .*; layer two"),
        (GRADIENTS, {"direction": "up"}, {}, "direction to be one of ArB2r, .*, got 'up'"),
        (GRADIENTS, {"scale": "big"}, {}, "scale to be one of stable, .*, got 'big'"),
        (GRADIENTS, {}, {"r": 9}, r"rank of at most min\(N, K\) / 2 = 8, got 9; layer one"),
        (GRADIENTS, {}, {"train": "b"}, "train both factors, got one"),
    ],
)
def test_bad_starts_leave_the_weights(gradients, settings, config, message) -> None:  # type: ignore[no-untyped-def]
    model, _ = model_and_linears()
    lk.adapt(model, lk.LoRAConfig(**{"r": 3, "target_modules": ("one", "two"), **config}))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"lora_ga: expected .*{message}"):
        lora_ga_(model, gradients, **settings)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_bad_exports(tmp_path: Path) -> None:
    model, _ = model_and_linears()
    with pytest.raises(ValueError, match="found none in Model"):
        lora_ga_(model, GRADIENTS)
    lk.adapt(model, CONFIG)
    with pytest.raises(ValueError, match="expected the start of every layer, got none of one"):
        lk.save_lora_ga_adapter(model, {}, tmp_path)
