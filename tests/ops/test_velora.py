"""VeLoRA's projections: what is saved, when the gradient is exact, and the formulas against one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import tuned
from lowrank_kernels.functional import velora_vector
from lowrank_kernels.reference import (
    velora_linear_ref,
    velora_project_ref,
    velora_reconstruct_ref,
    velora_vector_ref,
    velora_weight_grad_ref,
)
from tests.problems.lora import eager_lora_linear
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

M, K, N, R = 14, 24, 10, 3
F64 = torch.float64


def random(*shape: int, dtype: torch.dtype = F64, grad: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype).requires_grad_(grad)


def unit(length: int, dtype: torch.dtype = F64) -> Tensor:
    v = random(length, seed=5)
    return (v / v.norm()).to(dtype)


def lora(x: Tensor, v: Tensor | None, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """y and all gradients of a LoRA linear with these inputs."""
    dtype = x.dtype
    more = {"scaling": 0.7, "backend": "reference" if dtype == F64 else "auto", **more}
    trained = {
        "x": x.detach().requires_grad_(),
        "lora_a": random(R, K, dtype=dtype, grad=True),
        "lora_b": random(N, R, dtype=dtype, grad=True),
        "bias": random(N, dtype=dtype, grad=True),
        "gate": random(R, dtype=dtype, grad=True, seed=3),
    }
    y = lk.lora_linear(weight=random(N, K, dtype=dtype), velora_vector=v, **trained, **more)
    return y, dict(
        zip(trained, torch.autograd.grad(y, list(trained.values()), random(*y.shape, dtype=dtype)), strict=True)
    )


@pytest.mark.parametrize("d", [1, 3, 8, K])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_only_the_gradient_of_a_is_another(d: int, dropout_p: float) -> None:
    x, v = random(2, M // 2, K), unit(d)
    more = {"dropout_p": dropout_p, "dropout_seed": 3}
    (y, ours), (exact_y, exact) = lora(x, v, **more), lora(x, None, **more)
    assert torch.equal(y, exact_y)
    for name in ("x", "lora_b", "bias", "gate"):
        assert torch.equal(ours[name], exact[name]), name
    # dA = (s Qᵀ z) ⊗ v, z of drop(x): in each sub-token a multiple of v, by the projection of the exact one
    expected = velora_reconstruct_ref(velora_project_ref(exact["lora_a"], v), v)
    torch.testing.assert_close(ours["lora_a"], expected, rtol=1e-12, atol=1e-12)
    assert (d == 1) == torch.allclose(ours["lora_a"], exact["lora_a"])


@pytest.mark.parametrize("d", [1, 4, K])
def test_multiples_of_v_have_exact_gradients(d: int) -> None:
    v = unit(d)
    x = velora_reconstruct_ref(random(M, K // d), v)
    ours, exact = lora(x, v)[1], lora(x, None)[1]
    torch.testing.assert_close(ours["lora_a"], exact["lora_a"], rtol=1e-10, atol=1e-10)
    weight = random(N, K, grad=True)
    grads = [
        torch.autograd.grad(y, weight, random(M, N))[0]
        for y in (lk.velora_linear(x, weight, v), torch.nn.functional.linear(x, weight))
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_a_vector_of_another_length_scales_the_gradient() -> None:
    x, v = random(M, K), unit(4)
    torch.testing.assert_close(lora(x, 3**0.5 * v)[1]["lora_a"], 3 * lora(x, v)[1]["lora_a"])


def test_the_dense_gradients_are_the_formulas() -> None:
    x, weight, bias, v = random(M, K, grad=True), random(N, K, grad=True), random(N, grad=True), unit(6)
    dy = random(M, N, seed=9)
    y = lk.velora_linear(x, weight, v, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    grad_x, grad_w, grad_bias = torch.autograd.grad(y, (x, weight, bias), dy)
    torch.testing.assert_close(grad_x, dy @ weight)
    torch.testing.assert_close(grad_bias, dy.sum(0))
    torch.testing.assert_close(grad_w, velora_weight_grad_ref(dy, velora_project_ref(x.detach(), v), v))
    by_autograd = torch.autograd.grad(velora_linear_ref(x, weight, v, bias), (x, weight, bias), dy)
    for ours, theirs in zip((grad_x, grad_w, grad_bias), by_autograd, strict=True):
        torch.testing.assert_close(ours, theirs)


def saved(run: Callable[[], Any]) -> list[Tensor]:
    """What autograd keeps while ``run`` is called, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return list(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_of_x_the_projections_are_saved_and_no_byte_more(dtype: torch.dtype, dropout_p: float) -> None:
    """Beside z: P (M, R), v, and the operands W, A, B that are there anyway; with dropout the seed."""
    x, v, weight = random(2, M // 2, K, dtype=dtype, grad=True), unit(4), random(N, K, dtype=dtype)
    a, b = random(R, K, dtype=dtype, grad=True), random(N, R, dtype=dtype, grad=True)
    there = {t.untyped_storage().data_ptr() for t in (v, weight, a, b)}
    kept = saved(lambda: lk.lora_linear(x, weight, a, b, dropout_p=dropout_p, velora_vector=v))
    of_the_call = [t for t in kept if t.untyped_storage().data_ptr() not in there and t.numel() > 1]
    sizes = sorted(t.untyped_storage().nbytes() for t in of_the_call)
    assert sizes == sorted([M * (K // 4) * dtype.itemsize, M * R * dtype.itemsize])
    trained = weight.detach().requires_grad_()
    dense = [t for t in saved(lambda: lk.velora_linear(x, trained, v)) if t is not trained and t is not v]
    assert [t.untyped_storage().nbytes() for t in dense] == [M * (K // 4) * dtype.itemsize]


def test_nothing_is_projected_for_a_factor_that_does_not_train() -> None:
    x, v = random(M, K, dtype=torch.float32, grad=True), unit(4, torch.float32)
    weight, a = random(N, K, dtype=torch.float32), random(R, K, dtype=torch.float32)
    b = random(N, R, dtype=torch.float32, grad=True)
    assert sorted(t.shape for t in saved(lambda: lk.lora_linear(x, weight, a, b, velora_vector=v))) == sorted(
        [weight.shape, a.shape, b.shape, torch.Size([M, R])]
    )


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("needs_b", [False, True])
@pytest.mark.parametrize("choice", [{"base": "own"}, {"base": "library"}])
def test_every_way_through_the_cpu_gives_the_formula(choice: Any, needs_b: bool, factors: torch.dtype) -> None:
    v, given = unit(8), {"x": random(M, K, grad=True), "weight": random(N, K), "gate": random(R, grad=True)}
    given |= {"lora_a": random(R, K, grad=True), "lora_b": random(N, R, grad=needs_b)}
    dy = random(M, N).bfloat16()

    def grad(run: Callable[..., Tensor], half: bool, **more: Any) -> Tensor:
        cast = {}
        for name, t in given.items():
            narrow = t.detach().to(torch.bfloat16 if name in ("x", "weight") else factors)
            cast[name] = (narrow if half else narrow.double()).requires_grad_(t.requires_grad)
        y = run(**cast, velora_vector=v.bfloat16(), **more)
        return torch.autograd.grad(y, cast["lora_a"], dy.to(y.dtype))[0]

    with tuned.forcing("lora_linear") as force, tuned.forcing("lora_linear_backward") as force_backward:
        force(choice)
        force_backward(choice)
        ours = grad(lk.lora_linear, True, backend="cpu")
    assert ours.dtype == factors
    assert_as_exact_as_eager(
        ours, grad(eager_lora_linear, True), grad(eager_lora_linear, False), factor=GRADIENT_FACTOR, what="dA"
    )


def test_the_vector_is_the_mean_of_all_subtokens() -> None:
    x = random(2, M, K)
    v = velora_vector(x, 6)
    torch.testing.assert_close(v, velora_vector_ref(x, 6))
    torch.testing.assert_close(v, torch.nn.functional.normalize(x.reshape(-1, 6).mean(0), dim=0))
    mask = torch.arange(M).expand(2, M) >= torch.tensor([[3], [0]])
    x[0, :3] = 1e6
    torch.testing.assert_close(velora_vector(x, 6, mask), velora_vector(torch.cat([x[0, 3:], x[1]]), 6))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(3, 8), torch.full((4,), 0.5)),
        (torch.tensor([[1.0, 0.0, -1.0, 0.0]]).repeat(1, 2) * 1e-30, torch.tensor([1.0, 0.0, -1.0, 0.0]) / 2**0.5),
        (torch.zeros(0, 8), torch.zeros(4)),
        (torch.full((2, 8), float("nan")), torch.zeros(4)),
        (torch.tensor([[float("inf")] * 8]), torch.zeros(4)),
    ],
    ids=["zero mean", "tiny", "empty", "NaN", "infinite"],
)
def test_the_vector_of_a_batch_that_has_no_direction(x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(velora_vector(x, 4), expected)


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"velora_vector of shape \(d,\), d dividing K = 24, got \(5,\)"):
        lk.velora_linear(random(M, K), random(N, K), unit(5))
    with pytest.raises(ValueError, match="K a multiple of length = 5"):
        velora_vector(random(M, K), 5)


@pytest.mark.parametrize("family", ["lora", "dense"])
def test_transforms_of_torch_func_are_refused_where_they_would_be_exact(family: str) -> None:
    x, v = random(M, K, dtype=torch.float32), unit(4, torch.float32)
    b, weight = random(N, R, dtype=torch.float32), random(N, K, dtype=torch.float32)
    trained = random(N if family == "dense" else R, K, dtype=torch.float32)

    def loss(w: Tensor) -> Tensor:
        if family == "dense":
            return lk.velora_linear(x, w, v).sum()
        return lk.lora_linear(x, weight, w, b, velora_vector=v).sum()

    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(loss)(trained)


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    x, weight, v = random(M, K, dtype=torch.float32), random(N, K, dtype=torch.float32), unit(4, torch.float32)
    trained = [random(*s, dtype=torch.float32, grad=True) for s in ((R, K), (N, R), (N, K))]

    def both(x: Tensor) -> Tensor:
        a, b, w = trained
        return lk.lora_linear(x, weight, a, b, velora_vector=v) + lk.velora_linear(x, w, v)

    expected = torch.autograd.grad(both(x).square().sum(), trained)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(x).square().sum(), trained), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_casts_x_and_w_and_saves_z_in_half() -> None:
    x, weight, v = random(M, K, dtype=torch.float32), random(N, K, dtype=torch.float32, grad=True), unit(4)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.velora_linear(x, weight, v)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert grad.dtype == torch.float32
    exact = velora_weight_grad_ref(torch.ones(M, N, dtype=F64), velora_project_ref(x.double(), v), v)
    assert (grad - exact).norm() < 0.02 * exact.norm()


def test_a_second_derivative_is_refused() -> None:
    weight = random(N, K, grad=True)
    y = lk.velora_linear(random(M, K), weight, unit(4))
    (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="velora_linear: gradients of gradients are not implemented"):
        grad.sum().backward()
