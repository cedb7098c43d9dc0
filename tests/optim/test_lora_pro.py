"""LoRA-Pro: the equivalent gradient is the paper's projection, and the factors' share of it is the nearest."""

from __future__ import annotations

import pytest
import torch

from lowrank_kernels.optim.lora_pro import lora_pro_gradients, solve_sylvester

F64 = torch.float64


def problem(layers: int = 3, n: int = 11, k: int = 9, r: int = 4):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    a, b, g = (torch.randn(layers, *s, generator=generator, dtype=F64) for s in ((r, k), (n, r), (n, k)))
    scaling = torch.tensor([0.5, 1.0, 2.0][:layers], dtype=F64)[:, None, None]
    return a, b, g, scaling


def test_the_equivalent_gradient_is_the_projection() -> None:
    a, b, g, s = problem()
    g_a, g_b = lora_pro_gradients(a, b, s * b.mT @ g, s * g @ a.mT, s, eps=0.0)
    p_a = a.mT @ torch.linalg.inv(a @ a.mT) @ a
    p_b = b @ torch.linalg.inv(b.mT @ b) @ b.mT
    torch.testing.assert_close(s * (b @ g_a + g_b @ a), p_b @ g + g @ p_a - p_b @ g @ p_a, rtol=1e-10, atol=1e-10)


def test_no_other_gauge_is_nearer() -> None:
    """g_A + Y A, g_B - B Y has the same product for every Y; the solver's Y = 0 is the least distance."""
    a, b, g, s = problem()
    grad_a, grad_b = s * b.mT @ g, s * g @ a.mT
    g_a, g_b = lora_pro_gradients(a, b, grad_a, grad_b, s, eps=0.0)

    def distance(y: torch.Tensor) -> torch.Tensor:
        return (g_a + y @ a - grad_a).square().sum() + (g_b - b @ y - grad_b).square().sum()

    y = torch.zeros(3, 4, 4, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(y), y)
    assert slope.abs().max() < 1e-9 * distance(y)


def test_while_b_is_zero() -> None:
    a, b, g, s = problem()
    b = torch.zeros_like(b)
    g_a, g_b = lora_pro_gradients(a, b, s * b.mT @ g, s * g @ a.mT, s, eps=0.0)
    assert torch.equal(g_a, torch.zeros_like(g_a))
    torch.testing.assert_close(g_b, g @ a.mT @ torch.linalg.inv(a @ a.mT) / s, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_sylvester(condition: float, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    s, t = (torch.linalg.qr(torch.randn(5, 8, 8, generator=generator, dtype=F64))[0] for _ in range(2))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)), 8, dtype=F64)
    s, t = size * s * values @ s.mT, t * torch.linspace(1, 20, 8, dtype=F64) @ t.mT
    c = torch.randn(5, 8, 8, generator=generator, dtype=F64)
    x = solve_sylvester(s, t, c)
    residual = (s @ x + x @ t - c).norm() / ((s.norm() + t.norm()) * x.norm())
    assert residual < 1e-12


def test_factors_of_lower_rank_stay_finite() -> None:
    a, b, g, s = (t.float() for t in problem())
    b[..., 1] = b[..., 0]
    g_a, g_b = lora_pro_gradients(a, b, s * b.mT @ g, s * g @ a.mT, s)
    assert g_a.isfinite().all() and g_b.isfinite().all()
