"""LoRA-Pro: the equivalent gradient is the paper's projection, and the factors' share of it is the nearest."""

from __future__ import annotations

import pytest
import torch

from lowrank_kernels.optim.lora_pro import LoRAPro, lora_pro_gradients, solve_sylvester

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


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_three_steps_are_those_of_the_formulas(moments: str) -> None:
    """Momentum of (g_A, g_B); or Adam on the dense equivalent gradient, ε large enough to see its scale. And decay."""
    start_a, start_b, _, scaling = problem()
    a, b, s = start_a[0], start_b[0], scaling[0].item()
    pair = [torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())]
    optimizer = LoRAPro(
        [{"params": pair, "scaling": [s]}],
        lr=0.05,
        momentum=0.7,
        betas=(0.8, 0.9),
        adam_eps=0.3,
        eps=0.0,
        weight_decay=0.4,
        moments=moments,
    )
    m_a, m_b, mean, square = torch.zeros_like(a), torch.zeros_like(b), torch.zeros(11, 9), torch.zeros(11, 9)
    for step in (1, 2, 3):
        g = torch.randn(11, 9, generator=torch.Generator().manual_seed(step), dtype=F64)
        pair[0].grad, pair[1].grad = s * b.T @ g, s * g @ a.T
        optimizer.step()
        g_a, g_b = lora_pro_gradients(a, b, s * b.T @ g, s * g @ a.T, s, eps=0.0)
        if moments == "full":
            dense = s * (b @ g_a + g_b @ a)
            mean, square = 0.8 * mean + 0.2 * dense, 0.9 * square + 0.1 * dense**2
            d = mean / (1 - 0.8**step) / ((square / (1 - 0.9**step)).sqrt() + 0.3)
            m_a, m_b = lora_pro_gradients(a, b, s * b.T @ d, s * d @ a.T, s, eps=0.0)
        else:
            m_a, m_b = 0.7 * m_a + g_a, 0.7 * m_b + g_b
        a, b = (1 - 0.05 * 0.4) * a - 0.05 * m_a, (1 - 0.05 * 0.4) * b - 0.05 * m_b
        torch.testing.assert_close(pair[0].detach(), a, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pair[1].detach(), b, rtol=1e-10, atol=1e-10)


def test_factors_of_lower_rank_stay_finite() -> None:
    a, b, g, s = (t.float() for t in problem())
    b[..., 1] = b[..., 0]
    g_a, g_b = lora_pro_gradients(a, b, s * b.mT @ g, s * g @ a.mT, s)
    assert g_a.isfinite().all() and g_b.isfinite().all()
