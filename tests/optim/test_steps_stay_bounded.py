"""A step of LoRA-RITE and LoRA-Pro has its length for every rank, number of gradient rows, start and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.optim import LoRAPro, LoRARITE, factor_groups
from lowrank_kernels.optim.factors import Grams, within_first_order
from lowrank_kernels.optim.lora_pro import lora_pro_gradients
from lowrank_kernels.optim.lora_rite import inverse_root, polar_basis

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
N, K = 48, 64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def start_from(name: str, r: int) -> tuple[Tensor, Tensor]:
    """A (R, K) and B (N, R) of a start that is degenerate in the way that its name says."""
    a, b = randn(r, K, seed=1) / K**0.5, 0.3 * randn(N, r, seed=2)
    if name == "fresh":
        b.zero_()
    elif name == "tiny B":
        b *= 1e-6
    elif name == "tiny A":
        a *= 1e-6
    elif name == "zero A":
        a.zero_()
    elif name == "one direction":
        a, b = a[:1].expand(r, K), b[:, :1].expand(N, r)
    elif name == "one row of A":
        a, b = a[:1].expand(r, K), torch.zeros_like(b)
    elif name == "zero-padded":
        a[r // 2 :] = 0
        b[:, r // 2 :] = 0
    elif name == "B zero-padded in front":
        b[:, : r - r // 2] = 0
    elif name == "ill-conditioned":
        b *= torch.logspace(0, -8, r, dtype=F64)
    elif name == "low rank":
        b = 0.3 * randn(N, max(1, r // 3), seed=3) @ randn(max(1, r // 3), r, seed=4)
    return a.clone(), b.clone()


STARTS = (
    "full",
    "fresh",
    "tiny B",
    "tiny A",
    "zero A",
    "one direction",
    "one row of A",
    "zero-padded",
    "B zero-padded in front",
    "ill-conditioned",
    "low rank",
)


def train(optimizer: str, start: str, r: int, rows: int, dtype: torch.dtype, steps: int = 25) -> tuple[float, float]:
    """(the longest step of W in units of lr · s √(R/N + R/K), the greatest element of a factor)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(dtype)
    lk.adapt(model, lk.LoRAConfig(r=r, alpha=0.5 * r, dtype=dtype))
    a, b = model[0].lora_A.weight, model[0].lora_B.weight
    for factor, value in zip((a, b), start_from(start, r), strict=True):
        factor.data.copy_(value)
    lr = 1e-3 if optimizer == "rite" else 1e-2
    make = LoRARITE if optimizer == "rite" else LoRAPro
    step = make(factor_groups(model), lr=lr)
    x, y = randn(128, K, seed=5).to(dtype), randn(128, N, seed=6).to(dtype)
    unit, longest = lr * (r / N + r / K) ** 0.5, 0.0
    for i in range(steps):
        begin = rows * i % (128 - rows) if i < steps // 2 else 0  # other rows each step, then the same ones
        batch = slice(begin, begin + rows)
        step.zero_grad()
        (model(x[batch]) - y[batch]).float().square().mean().backward()
        before = b.detach().double() @ a.detach().double()
        step.step()
        moved = b.detach().double() @ a.detach().double() - before
        assert moved.isfinite().all()
        longest = max(longest, float(moved.square().mean().sqrt()) / unit)
    return longest, max(float(a.detach().abs().max()), float(b.detach().abs().max()))


# Ranks and rows of gradients: each of both once; all pairs nightly.
rite_sizes = pytest.mark.parametrize(
    "sizes",
    [
        ((1, 4), (8, 64), (32, 1)),
        pytest.param(tuple(itertools.product((1, 8, 32), (1, 4, 64))), marks=pytest.mark.nightly),
    ],
    ids=["some", "all"],
)
pro_sizes = pytest.mark.parametrize(
    "sizes",
    [
        ((1, 4), (16, 4), (32, 1)),
        pytest.param(tuple(itertools.product((1, 16, 32), (1, 4))), marks=pytest.mark.nightly),
    ],
    ids=["some", "all"],
)


@rite_sizes
@pytest.mark.parametrize(
    "dtype", [F32, F16, *(pytest.param(d, marks=pytest.mark.nightly) for d in (F64, BF16))], ids=str
)
@pytest.mark.parametrize("start", STARTS)
def test_lora_rites_step_has_the_length_that_the_rate_says(
    start: str, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]
) -> None:
    """Adam's freedom above it: gradients that agree for some steps after others that did not. In half precision also
    the rounding of the factors, which is of a step's size at rank 32."""
    for r, rows in sizes:
        longest, _ = train("rite", start, r, rows, dtype)
        assert longest < (5.0 if dtype == F16 else 2.5), (r, rows, longest)


@pro_sizes
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_lora_pros_step_stays_that_of_its_gradients(
    start: str, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]
) -> None:
    """Its steps scale with the gradient, here of mean squares, and momentum adds ten up: four of LoRA-RITE's units."""
    for r, rows in sizes:
        longest, _ = train("pro", start, r, rows, dtype)
        assert longest < 4.0, (r, rows, longest)


def test_directions_without_a_gradient_are_left_out() -> None:
    """Rows 1 and 2 of V hold rounding errors of float32 alone."""
    noise = torch.full((3, 3), 1e-14, dtype=F64)
    root = inverse_root(torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=F64)) + noise, 1e-6)
    assert abs(root[0, 0] - 0.5) < 1e-5
    assert root[1:].abs().max() < 1e-3  # (V + δ)^(-1/2) has 866 there


def test_a_basis_of_a_factor_of_lower_rank_has_only_its_directions() -> None:
    thin = randn(20, 2)
    factor = (thin @ randn(2, 5, seed=1)).float()
    u, inverse = polar_basis(factor, 1e-6)
    torch.testing.assert_close(factor @ inverse, u, rtol=1e-3, atol=1e-3)
    values = torch.linalg.svdvals(u)
    assert (values[:2] > 0.99).all() and (values[2:] < 1e-2).all()


def test_the_product_of_both_steps_is_cut_to_the_steps_themselves_and_no_further() -> None:
    a, b, step_a, step_b = (randn(2, *shape, seed=i) for i, shape in enumerate(((3, 9), (7, 3), (3, 9), (7, 3))))
    same_a, same_b = within_first_order(Grams.of(a, b), step_a, step_b, 0.01)
    assert torch.equal(same_a, step_a) and torch.equal(same_b, step_b)
    step_a[1] *= 1e6
    b[1] *= 1e-6
    cut_a, cut_b = within_first_order(Grams.of(a, b), step_a, step_b, 0.01)
    assert torch.equal(cut_a[0], step_a[0]) and torch.equal(cut_b, step_b)
    first = torch.linalg.matrix_norm(step_b @ a) + torch.linalg.matrix_norm(b @ step_a)
    torch.testing.assert_close(0.01 * torch.linalg.matrix_norm(cut_b @ cut_a)[1], first[1])


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_lora_pro_leaves_a_layer_with_alpha_zero_as_it_is(moments: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    lk.adapt(model, lk.LoRAConfig(r=2, alpha_pattern={"0": 0.0}))
    step = LoRAPro(factor_groups(model), moments=moments)
    before = [p.detach().clone() for p in model[0].parameters()]
    for _ in range(3):
        step.zero_grad()
        model(torch.ones(3, 8)).square().sum().backward()
        step.step()
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))
    assert model[1].lora_B.weight.isfinite().all() and model[1].lora_B.weight.any()


def test_lora_pros_gradients_hold_for_scalings_whose_square_float32_cannot_hold() -> None:
    a, b, g = randn(3, 9).float(), randn(7, 3, seed=1).float(), randn(7, 9, seed=2).float()
    wanted = [lora_pro_gradients(a, b, b.T @ g, g @ a.T, 1.0)[i] for i in range(2)]
    for s in (1e-25, 1e25):
        found = lora_pro_gradients(a, b, s * b.T @ g, s * g @ a.T, s)
        for ours, unit in zip(found, wanted, strict=True):
            torch.testing.assert_close(s * ours, unit, rtol=1e-4, atol=1e-5)
