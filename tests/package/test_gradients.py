"""What LoRA-GA and Sparse Matrix Tuning collect gradients with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_kernels.gradients import summed_gradients


def model_and_batches() -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    model[0].bias.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    return model, [torch.randn(3, 6, dtype=torch.float64) for _ in range(3)]


def test_the_sums_are_those_of_each_batchs_gradient_and_the_model_is_as_before():
    model, batches = model_and_batches()
    weights = {"first": model[0].weight, "again": model[0].weight, "last": model[2].weight}
    wanted = {
        name: sum(torch.autograd.grad(model(x).square().sum(), weight)[0].float() for x in batches)
        for name, weight in weights.items()
    }
    with summed_gradients(model, weights) as sums:
        for x in batches:
            model(x).square().sum().backward()
            assert all(p.grad is None for p in model.parameters())
    assert sums.keys() == wanted.keys() and all(torch.equal(sums[name], wanted[name]) for name in wanted)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert model[0].weight.grad is None and torch.equal(model[2].weight.grad, torch.ones(4, 5, dtype=torch.float64))


def test_a_step_is_given_each_parameter_that_trains_with_its_gradient():
    model, batches = model_and_batches()
    stepped = []
    with summed_gradients(
        model,
        {"first": model[0].weight},
        reduce=lambda gradient: gradient.sum(0),
        step=lambda p: stepped.append((id(p), p.grad.shape)),
    ) as sums:
        model(batches[0]).square().sum().backward()
    trained = (model[0].weight, model[2].weight, model[2].bias)
    assert set(stepped) == {(id(p), p.shape) for p in trained}
    assert sums["first"].shape == (6,) and sums["first"].dtype == torch.float32


def test_an_error_puts_the_model_back():
    model, batches = model_and_batches()
    with pytest.raises(RuntimeError, match="broken"), summed_gradients(model, {"first": model[0].weight}):
        model(batches[0]).sum().backward()
        raise RuntimeError("broken")
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    model(batches[0]).sum().backward()  # no hook is left that would take the gradient
    assert model[0].weight.grad is not None
