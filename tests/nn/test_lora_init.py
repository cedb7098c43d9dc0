"""Starting points: their distributions, and that the correction starts at zero."""

import math

import pytest
import torch
from torch import nn

from lowrank_kernels.init import INITS, init_factors_
from lowrank_kernels.nn import LoRALinear


@pytest.fixture(autouse=True)
def seeded():
    """These tests are about distributions: one draw, known to be an ordinary one."""
    torch.manual_seed(0)


def factors(init, k=600, n=500, r=50, sampled="a"):
    a, b = torch.full((r, k), math.nan), torch.full((n, r), math.nan)
    init_factors_(a, b, init, sampled=sampled)
    return a, b


@pytest.mark.parametrize("sampled", ["a", "b"])
@pytest.mark.parametrize("init", [i for i in INITS if i != "zero"])
def test_one_factor_is_sampled_and_the_product_is_zero(init, sampled):
    a, b = factors(init, sampled=sampled)
    drawn, zero = (a, b) if sampled == "a" else (b, a)
    assert zero.count_nonzero() == 0 and drawn.count_nonzero() > 0.99 * drawn.numel()
    assert torch.isfinite(drawn).all()


def test_kaiming_is_the_default_of_peft():
    a, _ = factors("kaiming")
    bound = 1 / math.sqrt(600)
    assert a.abs().max() <= bound and a.abs().max() > 0.999 * bound
    assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.numel())
    assert abs(a.var() / (bound**2 / 3) - 1) < 0.03


def test_gaussian_has_standard_deviation_one_over_r():
    a, _ = factors("gaussian")
    assert abs(a.std() * 50 - 1) < 0.03 and abs(a.mean() * 50) < 4 / math.sqrt(a.numel())


def test_orthonormal_directions():
    a, _ = factors("orthonormal")
    torch.testing.assert_close(a @ a.T, torch.eye(50), atol=1e-5, rtol=0)
    _, b = factors("orthonormal", sampled="b")
    torch.testing.assert_close(b.T @ b, torch.eye(50), atol=1e-5, rtol=0)
    square, _ = factors("orthonormal", k=6, n=6, r=6)
    torch.testing.assert_close(square @ square.T, torch.eye(6), atol=1e-5, rtol=0)


def test_orthonormal_has_no_preferred_sign():
    means = torch.stack([factors("orthonormal", k=3, n=3, r=1)[0] for _ in range(400)]).mean(0)
    assert means.abs().max() < 4 * math.sqrt(1 / 3 / 400)


def test_zero_and_seed():
    a, b = factors("zero")
    assert a.count_nonzero() == 0 and b.count_nonzero() == 0
    torch.manual_seed(3)
    first = factors("kaiming")[0]
    torch.manual_seed(3)
    assert torch.equal(factors("kaiming")[0], first)


@pytest.mark.parametrize("init", list(INITS))
@pytest.mark.parametrize("train", ["both", "a", "b"])
def test_a_fresh_layer_is_the_linear_it_wraps(init, train):
    linear = nn.Linear(20, 12)
    x = torch.randn(4, 20)
    y = linear(x)
    layer = LoRALinear.from_linear(linear, 5, init=init, train=train)
    torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="at most 4"):
        factors("orthonormal", k=4, r=5)
    with pytest.raises(ValueError, match="init to be one of"):
        factors("xavier")
    with pytest.raises(ValueError, match="sampled to be"):
        factors("kaiming", sampled="c")
