"""What every op family must do with its Triton kernels, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowrank_kernels.families import WITH_TRITON
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from tests.problems import Problem, differentiate, leaves, problems
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

PROBLEMS = [pytest.param(p, id=p.name) for p in problems(WITH_TRITON)]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_result_and_gradients_are_as_exact_as_eager(problem: Problem) -> None:
    """Every kernel stays inside its arguments, uses no atomics and no driver, and every element is written."""
    with record_memory(), without_driver():
        y, grads = differentiate(lambda t: problem.run(t, "triton"), leaves(problem.tensors))
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


@pytest.mark.parametrize("problem", PROBLEMS[:12:4])
def test_same_bits_every_time(problem: Problem) -> None:
    first_y, first = differentiate(lambda t: problem.run(t, "triton"), leaves(problem.tensors))
    again_y, again = differentiate(lambda t: problem.run(t, "triton"), leaves(problem.tensors))
    assert torch.equal(first_y, again_y)
    for name, grad in first.items():
        assert torch.equal(grad, again[name]), name


@pytest.mark.parametrize("problem", PROBLEMS[:12:4])
def test_only_the_gradients_asked_for(problem: Problem) -> None:
    """Asked for alone, a gradient is what it is among the others, up to the order of its sums."""
    _, together = differentiate(lambda t: problem.run(t, "triton"), leaves(problem.tensors))
    for name, grad in together.items():
        alone = replace(problem, tensors={n: t.detach() for n, t in problem.tensors.items()})
        alone.tensors[name] = alone.tensors[name].clone().requires_grad_()
        _, grads = differentiate(lambda t: problem.run(t, "triton"), leaves(alone.tensors))
        assert grads.keys() == {name}
        error = (grads[name].double() - grad.double()).abs().max()
        assert error <= 4 * torch.finfo(grad.dtype).eps * grad.double().abs().max(), name
