"""LoRA-RITE: the path of B A does not depend on how it is factored; Adam's does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank_kernels.optim import LoRARITE
from lowrank_kernels.optim.lora_rite import inverse_root, polar_basis

F64 = torch.float64


def path(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], change: Tensor | None) -> Tensor:
    """B A after 20 steps towards a target, from (B C, C⁻¹ A)."""
    generator = torch.Generator().manual_seed(0)
    a, b, target = (torch.randn(*s, generator=generator, dtype=F64) for s in ((3, 12), (10, 3), (10, 12)))
    if change is not None:
        a, b = torch.linalg.inv(change) @ a, b @ change
    pair = [nn.Parameter(a), nn.Parameter(b)]
    step = optimizer(pair)
    for _ in range(20):
        step.zero_grad()
        (pair[1] @ pair[0] - target).square().sum().backward()
        step.step()
    return (pair[1] @ pair[0]).detach()


def test_invariance() -> None:
    change = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.1, 0.3], [0.5, 0.0, 5.0]], dtype=F64)

    def rite(pair: list[nn.Parameter]) -> torch.optim.Optimizer:
        return LoRARITE([{"params": pair, "scaling": [1.0]}], lr=0.05)

    def adam(pair: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(pair, lr=0.05)

    plain, moved = path(rite, None), path(rite, change)
    start = path(lambda pair: torch.optim.SGD(pair, lr=0.0), None)
    assert (plain - start).norm() > 1.0
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-9)
    assert (path(adam, change) - path(adam, None)).norm() > 0.5


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_step_has_the_length_that_the_rate_says(size: float) -> None:
    """lr · s √(R/N + R/K), the root mean square over W's elements, whatever the size of factors and gradient."""
    n, k, r, s, lr = 96, 160, 8, 0.5, 1e-7
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(size * torch.randn(*shape, generator=generator, dtype=F64)) for shape in ((r, k), (n, r)))
    step = LoRARITE([{"params": [a, b], "scaling": [s]}], lr=lr)
    for _ in range(5):
        before, gradient = b.detach() @ a.detach(), 300 * torch.randn(n, k, generator=generator, dtype=F64)
        a.grad, b.grad = s * b.detach().T @ gradient, s * gradient @ a.detach().T
        step.step()
    moved = s * (b.detach() @ a.detach() - before)
    length = moved.square().mean().sqrt() / lr
    expected = s * (r / n + r / k) ** 0.5
    # Five gradients that have nothing in common: the mean of the first moments is shorter than one of them.
    weights = torch.tensor([0.9**i for i in range(5)], dtype=F64)
    assert abs(length / (expected * weights.norm() / weights.sum()) - 1) < 0.05


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6])
def test_inverse_root(smallest: float) -> None:
    u = torch.linalg.qr(torch.randn(4, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.logspace(0, torch.log10(torch.tensor(smallest)), 8, dtype=F64)
    root = inverse_root(7.0 * u * values @ u.mT, 0.0)
    expected = u * (7.0 * values).rsqrt() @ u.mT
    assert (root - expected).norm() < 1e-8 * expected.norm()
    assert not inverse_root(torch.zeros(2, 3, 3), 1e-6).any()


def test_a_zero_factor_divides_by_nothing() -> None:
    u, inverse = polar_basis(torch.zeros(2, 6, 3), 1e-6)
    assert inverse.isfinite().all() and u.isfinite().all()
    tall = torch.randn(2, 6, 3, dtype=F64)
    u, inverse = polar_basis(tall, 1e-6)
    torch.testing.assert_close(tall @ inverse, u)
