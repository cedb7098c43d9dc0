"""What every op family must do on a CPU, with each backend that runs there."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import families, tuned
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


@pytest.mark.parametrize("choice", [None, {"base": "own"}, {"base": "library"}])
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if "bias" in p.values[0].tensors])
def test_a_bias_may_have_another_dtype_than_x(problem: Problem, choice: tuned.Fields | None) -> None:
    dtype = problem.tensors["x"].dtype
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    values = problem.tensors["bias"].detach().mul(8).round() / 8  # which every dtype can hold
    with ExitStack() as stack:
        for op in families.OPS:
            stack.enter_context(tuned.forcing(op))(choice)
        (y, grads), (again_y, again) = (
            differentiate(
                lambda t: problem.run(t, "auto"),
                leaves(problem.tensors | {"bias": values.to(of).requires_grad_()}),
            )
            for of in (dtype, other)
        )
    assert torch.equal(y, again_y)
    assert again["bias"].dtype == other
    torch.testing.assert_close(again["bias"], grads["bias"].to(other))


LINEARS = {
    "lora_linear": lambda x, w, a, b: lk.lora_linear(x, w, a, b),
    "frozen_linear": lambda x, w, a, b: lk.frozen_linear(x, w),
    "velora_linear": lambda x, w, a, b: lk.velora_linear(x, w.clone().requires_grad_(), torch.full((4,), 0.5)),
    "dora_linear": lambda x, w, a, b: lk.dora_linear(x, w, a, b, torch.ones(32)),
    "block_sparse_linear": lambda x, w, a, b: lk.block_sparse_linear(
        x, w, torch.zeros(1, 16, 16), torch.zeros(1, 2, dtype=torch.int32)
    ),
    "multi_lora_linear": lambda x, w, a, b: lk.multi_lora_linear(
        x, w, lk.LoRAStack.from_factors([(a, b, 1.0)]), torch.zeros(x.shape[:-1].numel(), dtype=torch.int64)
    ),
    "experts_linear": lambda x, w, a, b: lk.experts_linear(
        x.reshape(-1, 16),
        w[None],
        lk.LoRAStack.from_factors([(a, b, 1.0)]),
        torch.zeros(x.shape[:-1].numel(), dtype=int),
    ),
    "svft_linear": lambda x, w, a, b: lk.svft_linear(
        x, w, b, a, torch.ones(2), lk.svft_pattern(torch.tensor([[0, 1], [1, 0]]), 2, 2)
    ),
}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("op", LINEARS)
def test_a_result_may_be_changed_in_place(op: str, shape: tuple[int, ...]) -> None:
    """As models do with a linear's: DeBERTa divides it."""
    x, w, a, b = (torch.randn(*s) for s in ((*shape, 16), (32, 16), (2, 16), (32, 2)))
    x.requires_grad_()
    y = LINEARS[op](x, w, a, b)
    y /= 2
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(LINEARS[op](x, w, a, b).sum() / 2, x)[0])


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if "float32" in p.id])
def test_a_backward_in_autocast_has_the_bits_of_one_outside(problem: Problem) -> None:
    def grads(enabled: bool) -> dict[str, torch.Tensor]:
        tensors = leaves(problem.tensors)
        y = problem.run(tensors, "auto")
        wanted = {name: t for name, t in tensors.items() if t.requires_grad}
        grad_y = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_y), strict=True))

    outside, inside = grads(False), grads(True)
    for name, grad in outside.items():
        assert torch.equal(inside[name], grad), name


@pytest.mark.parametrize("problem", PROBLEMS)
def test_same_bits_every_time(problem: Problem) -> None:
    first_y, first = differentiate(lambda t: problem.run(t, "cpu"), leaves(problem.tensors))
    again_y, again = differentiate(lambda t: problem.run(t, "cpu"), leaves(problem.tensors))
    assert torch.equal(first_y, again_y)
    for name, grad in first.items():
        assert torch.equal(grad, again[name]), name
