"""What every op family must do on a CPU, with each backend that runs there."""

from __future__ import annotations

import pytest
import torch

from tests.problems import Problem, differentiate, leaves, problems
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

PROBLEMS = [pytest.param(p, id=p.name) for p in problems()]


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_result_and_gradients_are_as_exact_as_eager(problem: Problem, backend: str) -> None:
    y, grads = differentiate(lambda t: problem.run(t, backend), leaves(problem.tensors))
    eager_y, eager_grads = differentiate(problem.eager, leaves(problem.tensors))
    oracle_y, oracle_grads = differentiate(
        lambda t: problem.run(t, "reference"), leaves(problem.tensors, torch.float64)
    )
    assert_as_exact_as_eager(y, eager_y, oracle_y, what="y")
    assert grads.keys() == oracle_grads.keys()
    for name, grad in grads.items():
        assert_as_exact_as_eager(
            grad, eager_grads[name], oracle_grads[name], factor=GRADIENT_FACTOR, what=f"gradient of {name}"
        )


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_oracle_agrees_with_the_plain_formula(problem: Problem) -> None:
    """The reference's explicit backward against autograd of plain PyTorch, both in float64."""
    tensors = leaves(problem.tensors, torch.float64)
    y, grads = differentiate(lambda t: problem.run(t, "reference"), tensors)
    plain_y, plain_grads = differentiate(problem.eager, leaves(problem.tensors, torch.float64))
    torch.testing.assert_close(y, plain_y, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_same_bits_every_time(problem: Problem) -> None:
    first_y, first = differentiate(lambda t: problem.run(t, "cpu"), leaves(problem.tensors))
    again_y, again = differentiate(lambda t: problem.run(t, "cpu"), leaves(problem.tensors))
    assert torch.equal(first_y, again_y)
    for name, grad in first.items():
        assert torch.equal(grad, again[name]), name
