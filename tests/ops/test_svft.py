"""SVFT's linear: gradients at the places of M alone, what is kept, layouts, threads; every backend.

tests/ops/test_instruction_sets.py runs the `core` tests of this file on the lower instruction sets too.
"""

from __future__ import annotations

import os

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.ops.svft import SVFTLinear, _multiply, plan_svft_linear
from lowrank_kernels.reference import svft_linear_backward_ref, svft_linear_ref
from tests.problems import differentiate, leaves
from tests.problems.lora import BF16, F16, F32
from tests.problems.svft import eager_svft_linear, places, svft_tensors
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

BACKENDS = ["reference", "cpu"] if _extension.has_op("svft_multiply") else ["reference"]
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    BACKENDS = ["triton"]  # tests/interpreter/test_svft.py runs those tests that take a backend
ON_EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
CASES = [
    ((1, 8, 8), places(8, 8), (8, 8)),
    ((37, 70, 50), places(50, 50, band=2), (50, 50)),
    ((16, 33, 40), places(17, 30, 61), (17, 30)),
    ((270, 20, 30), places(20, 20, 399), (20, 20)),
]


def in_float64(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: v.detach().double() if v.is_floating_point() else v for name, v in t.items()}


@ON_EACH_BACKEND
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_core_y_and_gradients_are_as_exact_as_eager(dtype: torch.dtype, backend: str) -> None:
    for sizes, index, shape in CASES:
        t = svft_tensors(sizes, index, shape, dtype, bias=True)
        y, grads = differentiate(lambda t: lk.svft_linear(**t, backend=backend), leaves(t))
        eager_y, eager = differentiate(lambda t, i=index: eager_svft_linear(t, i), leaves(t))  # type: ignore[misc]
        exact_y, exact = differentiate(lambda t: lk.svft_linear(**t, backend="reference"), leaves(t, torch.float64))
        assert_as_exact_as_eager(y, eager_y, exact_y, what=f"y of {sizes}")
        for name, grad in grads.items():
            assert_as_exact_as_eager(grad, eager[name], exact[name], factor=GRADIENT_FACTOR, what=f"{name} of {sizes}")


def test_the_gradient_is_that_of_w_in_the_basis_at_the_places_alone() -> None:
    """dM = Uᵀ G V at the places, with G = dYᵀ x the gradient that W would have; dX = dY (W + U M Vᵀ). In float64."""
    index = places(9, 11, 20)
    t = in_float64(svft_tensors((30, 14, 12), index, (9, 11), F32))
    x, values = t["x"].detach().requires_grad_(), t["values"].detach().requires_grad_()
    y = lk.svft_linear(**{**t, "x": x, "values": values}, backend="reference")
    dy = torch.randn_like(y)
    grad_x, grad_values = torch.autograd.grad(y, (x, values), dy)
    m = torch.zeros(9, 11, dtype=torch.float64)
    m[index[0], index[1]] = values.detach()
    of_weight = t["u"].T @ (dy.T @ x.detach()) @ t["vh"].T
    torch.testing.assert_close(grad_values, of_weight[index[0], index[1]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_x, dy @ (t["weight"] + t["u"] @ m @ t["vh"]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
def test_core_a_row_does_not_feel_its_batch(backend: str) -> None:
    """In the product with M, which is this package's own."""
    t = svft_tensors((33, 20, 24), places(20, 20, band=1), (20, 20), F32)
    rows = t["x"].detach()
    pattern, values = t["pattern"], t["values"].detach()
    whole = _multiply(backend, rows, values, pattern, 20, False)
    assert torch.equal(_multiply(backend, rows[5:6], values, pattern, 20, False), whole[5:6])
    assert torch.equal(_multiply(backend, rows[7:30], values, pattern, 20, False), whole[7:30])


@ON_EACH_BACKEND
def test_core_layouts_and_memory_around_them(backend: str) -> None:
    t = svft_tensors((19, 26, 22), places(15, 18, 50), (15, 18), F32, bias=True)
    known, grads = differentiate(lambda t: lk.svft_linear(**t, backend=backend), leaves(t))
    apart = {}
    for name, v in t.items():
        if name == "pattern":
            continue
        around = torch.full((*(n + 3 for n in v.shape[:-1]), 2 * v.shape[-1] + 4), torch.nan)
        inside = around[(*(slice(1, n + 1) for n in v.shape[:-1]), slice(2, 2 * v.shape[-1] + 2, 2))]
        apart[name] = inside.copy_(v.detach()).requires_grad_(v.requires_grad)
    again, others = differentiate(lambda t: lk.svft_linear(**t, backend=backend), {**apart, "pattern": t["pattern"]})
    torch.testing.assert_close(again, known)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad)


@ON_EACH_BACKEND
def test_core_nan_stays_in_its_token(backend: str) -> None:
    t = svft_tensors((20, 12, 10), places(10, 10), (10, 10), F32)
    x = t["x"].detach().clone()
    x[4, 3] = torch.nan
    y = lk.svft_linear(**{**t, "x": x}, backend=backend)
    assert y[4].isnan().all() and y.isnan().any(1).sum() == 1


def kept(t: dict[str, torch.Tensor]) -> list[torch.Size]:
    """The shapes that a call saves beside its own operands."""
    found: list[torch.Tensor] = []
    own = {v.data_ptr() for v in t.values() if v is not t["x"]}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: found.append(s) or s, lambda s: s):  # type: ignore[func-returns-value]
        lk.svft_linear(**t)
    return [s.shape for s in found if s.data_ptr() not in own]


def test_t_alone_is_kept_and_where_m_is_frozen_nothing() -> None:
    t = svft_tensors((20, 40, 12), places(12, 12), (12, 12), F32)
    assert kept(t) == [(20, 12)]
    assert kept({**t, "values": t["values"].detach()}) == []


def test_threads_and_repeats_give_the_same_bits() -> None:
    before, t = torch.get_num_threads(), svft_tensors((600, 300, 260), places(260, 260, band=2), (260, 260), BF16)
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(differentiate(lambda t: lk.svft_linear(**t), leaves(t)))
    finally:
        torch.set_num_threads(before)
    for y, grads in found[1:]:
        assert torch.equal(y, found[0][0])
        assert all(torch.equal(grads[name], grad) for name, grad in found[0][1].items())


def test_the_oracles_backward_is_autograd_of_its_forward() -> None:
    index = places(6, 7, 15)
    t = in_float64(svft_tensors((9, 8, 10), index, (6, 7), F32))
    x, values = t["x"].detach().requires_grad_(), t["values"].detach().requires_grad_()
    y, kept_t = svft_linear_ref(x, t["weight"], t["u"], t["vh"], values, index)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, values), dy)
    found = svft_linear_backward_ref(dy, t["weight"], t["u"], t["vh"], values.detach(), index, kept_t.detach())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


def test_transforms_differentiate_the_formula() -> None:
    t = svft_tensors((5, 8, 6), places(6, 6), (6, 6), F32)
    x, values = t["x"].detach(), t["values"].detach()
    per_token = torch.func.vmap(
        torch.func.grad(lambda v, x: lk.svft_linear(**{**t, "x": x, "values": v}).sum()), in_dims=(None, 0)
    )(values, x)
    whole = torch.func.grad(lambda v: lk.svft_linear(**{**t, "x": x, "values": v}).sum())(values)
    assert per_token.shape == (5, 6)
    torch.testing.assert_close(per_token.sum(0), whole)


def test_autocast_rounds_x_and_w_and_keeps_the_values() -> None:
    t = svft_tensors((6, 16, 12), places(12, 12), (12, 12), F32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.svft_linear(**t)
    (grad,) = torch.autograd.grad(y.float().sum(), t["values"])
    assert y.dtype == BF16 and grad.dtype == F32


@pytest.mark.parametrize("kind", [lk.weights.NF4Weight, lk.weights.Int8Weight])
def test_a_weight_of_few_bits_is_never_made_dense(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    t = svft_tensors((6, 64, 96), places(64, 64), (64, 64), F32)
    stored = kind.from_dense(t["weight"])  # type: ignore[attr-defined]
    expected = lk.svft_linear(**{**t, "weight": stored.dense()})
    y = lk.svft_linear(**{**t, "weight": stored})
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_torch_finds_nothing_wrong_with_the_op() -> None:
    t = svft_tensors((6, 16, 12), places(12, 12, band=1), (12, 12), F32)
    torch.library.opcheck(torch.ops.lowrank_kernels.svft_linear.default, (*t.values(), None, True, "auto"))


def test_a_second_backward_is_refused() -> None:
    t = svft_tensors((4, 8, 6), places(6, 6), (6, 6), F32)
    (grad,) = torch.autograd.grad(lk.svft_linear(**t).square().sum(), t["values"], create_graph=True)
    with pytest.raises(RuntimeError, match="svft_linear: gradients of gradients are not implemented"):
        grad.sum().backward()


def test_a_plan_is_made_once_for_a_calls_metadata() -> None:
    t = svft_tensors((4, 8, 6), places(6, 6), (6, 6), F32)
    call = SVFTLinear(*t.values(), None, False, "auto")  # type: ignore[arg-type]
    plan = plan_svft_linear(call)
    assert plan is plan_svft_linear(call._replace(x=t["x"].detach().clone().requires_grad_()))


@pytest.mark.skipif(not _extension.has_op("svft_multiply"), reason="the compiled extension")
def test_the_extension_reads_nothing_outside_of_its_operands() -> None:
    """What a caller of the raw op can make of a pattern."""
    t = svft_tensors((4, 8, 6), places(6, 6), (6, 6), F32)
    for place in range(t["pattern"].numel()):
        for value in (-1, 100):
            broken = t["pattern"].clone()
            broken[place] = value
            with pytest.raises(RuntimeError, match="expected a pattern whose"):
                lk.svft_linear(**{**t, "pattern": broken}, backend="cpu")
