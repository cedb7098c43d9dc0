"""Calls that go past this package's ops: when they do, that nobody can tell, and that nothing is checked less."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_kernels as lk
from lowrank_kernels import _extension, functional, tuned
from lowrank_kernels.ops import lora as lora_op
from lowrank_kernels.ops import merge as merge_op
from lowrank_kernels.ops import multi_lora as multi_op
from tests.tolerance import assert_as_exact_as_eager

_extension.require("lora_linear_inference")
_extension.require("multi_lora_linear_inference")
CPP = torch.ops.lowrank_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K, N, R = 96, 80, 7


@pytest.fixture(autouse=True)
def no_table(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.FLAG, str(tmp_path / "none.json"))
    tuned.forget()
    yield
    monkeypatch.undo()
    tuned.forget()


def operands(rows=(5,), dtype=torch.float32, factors=None, trained=()):
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (*rows, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,), "gate": (R,)}
    return {
        name: (torch.randn(size, generator=generator) / size[-1] ** 0.5)
        .to(dtype if name in ("x", "weight") or factors is None else factors).requires_grad_(name in trained)
        for name, size in sizes.items()
    }  # fmt: skip


def way(x, weight, lora_a, lora_b, bias=None, gate=None):
    return lora_op.lora_linear_way(x, weight, lora_a, lora_b, bias, gate)


@contextmanager
def forced(op, choice):
    with tuned.forcing(op) as force:
        force(choice)
        yield


# ------------------------------------------------------------------------------------------------------- one adapter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (3,), (8,), (9,), (2, 4), (1, 5, 3), (0,), (2, 0), (200,)])
def test_the_one_call_is_the_op_without_what_is_saved(rows, dtype):
    given = operands(rows, dtype, torch.float32)
    x, weight, a, b, bias, gate = given.values()
    scale = torch.rand(N)
    for extra in ((None, None, None), (bias, gate, None), (bias, None, scale)):
        y = CPP.lora_linear_inference(x, weight, a, b, *extra[:2], 0.7, extra[2])
        known = CPP.lora_linear_fused(x.reshape(-1, K), weight, a, b, *extra[:2], 0.7, None, 0.0, extra[2], True)[0]
        assert y.shape == (*rows, N) and y.dtype == dtype and torch.equal(y.view(-1, N), known)


def test_the_one_call_takes_rows_apart_and_refuses_what_does_not_fit():
    x, weight, a, b, *_ = operands((10,)).values()
    apart = torch.cat([x, x], dim=1)[:, :K]
    assert torch.equal(
        CPP.lora_linear_inference(apart, weight, a, b, None, None, 1.0, None),
        CPP.lora_linear_inference(x, weight, a, b, None, None, 1.0, None),
    )
    cube = x.view(2, 5, K)
    for wrong, message in (
        ((cube.transpose(0, 1), weight, a, b, None), "contiguous where it is no matrix"),
        ((x[:, 1:], weight, a, b, None), "expected x of 96 columns"),
        ((torch.tensor(1.0), weight, a, b, None), "expected x of 96 columns"),
        ((x, weight, a[:, 1:], b, None), "expected factor of shape"),
        ((x, weight, a, b[1:], None), r"expected lora_b of shape \(N, R\) = \(80, 7\), got \(79, 7\)"),
        ((x, weight, a, b, torch.ones(3)), "expected bias of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            CPP.lora_linear_inference(*wrong, None, 1.0, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("k", "n", "r"), [(1, 1, 1), (31, 33, 7), (257, 45, 16), (64, 1, 33), (300, 40, 130)])
def test_rows_beside_a_row_of_the_weight(m, k, n, r, dtype):
    """The form for very few tokens, at widths that fill no register, against float64."""
    generator = torch.Generator().manual_seed(m)
    x, w, a, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((m, k), (n, k), (r, k), (n, r)))
    y = CPP.lora_linear_inference(x, w, a, b, None, None, 0.5, None)
    eager = x @ w.T + 0.5 * ((x @ a.T) @ b.T)
    exact = x.double() @ w.double().T + 0.5 * ((x.double() @ a.double().T) @ b.double().T)
    assert_as_exact_as_eager(y, eager, exact, what="y")
    for row in range(m):
        assert torch.equal(CPP.lora_linear_inference(x[row : row + 1], w, a, b, None, None, 0.5, None)[0], y[row])


def test_which_calls_go_past_the_op():
    with forced("lora_linear", "own_product"):
        given = operands()
        assert way(**given) == "own_product" and way(**operands((2, 3))) == "own_product"
        for name in given:
            if name == "weight":
                continue
            training = operands(trained=(name,))
            assert way(**training) == "op"
            with torch.no_grad():
                assert way(**training) == "own_product"
        for odd in ({"x": given["x"].repeat(1, 2)[:, :K]}, {"weight": given["weight"].T.contiguous().T}):
            assert way(**(given | odd)) == "op"  # strides that the one call does not take
        assert way(**(given | {"lora_a": given["lora_a"].double()})) == "op"

        class Listening(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        with Listening():
            assert way(**given) == "op"
        with torch.autograd.profiler.profile():
            assert way(**given) == "op"
        with torch.autocast("cpu", torch.bfloat16):
            assert way(**given) == "op"
    for choice in ("library_product", "reference"):
        with forced("lora_linear", choice):
            assert way(**operands()) == "op"
    assert way(**{name: t.to("meta") for name, t in operands().items()}) == "op"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(5, K + 1)}, "expected x of shape"),
        ({"x": torch.ones(5, K, dtype=torch.bfloat16)}, "expected x and weight of one dtype"),
        ({"x": torch.ones(5, K, dtype=torch.int64)}, "floating dtype"),
        ({"x": None}, "expected x to be a tensor"),
        ({"lora_a": torch.ones(0, K), "lora_b": torch.ones(N, 0), "gate": None}, "rank of at least 1"),
        ({"lora_b": torch.ones(R, N)}, "expected lora_b of shape"),
        ({"lora_a": torch.ones(R, K, 1)}, "expected lora_a of shape"),
        ({"lora_b": torch.ones(N, R, 1)}, "expected lora_b of shape"),
        ({"weight": torch.ones(N, K).requires_grad_()}, "frozen weight"),
        ({"weight": torch.ones(N)}, "expected weight of shape"),
        ({"bias": torch.ones(N, dtype=torch.int32)}, "expected bias of a floating dtype"),
        ({"gate": torch.ones(R + 1)}, "expected gate of shape"),
        ({"lora_a": torch.ones(R, K, device="meta")}, "expected lora_a on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_before_and_after_what_does(change, message):
    given = operands(trained=("lora_a",))
    for _ in range(2):
        lk.lora_linear(**given)
        with torch.no_grad():
            lk.lora_linear(**given)
        with pytest.raises((TypeError, ValueError), match=message):
            lk.lora_linear(**(given | change))
    with torch.autocast("cpu", torch.bfloat16):  # two dtypes are right here, and stay wrong elsewhere
        mixed = given | {"x": given["x"].bfloat16()}
        assert lk.lora_linear(**mixed).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="expected x and weight of one dtype"):
        lk.lora_linear(**mixed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (0,)])
def test_dora_in_inference_has_the_bits_of_training(rows, dtype):
    x, weight, a, b, bias, _ = operands(rows, dtype).values()
    magnitude = torch.rand(N).to(dtype)
    norm, scale, _ = lk.dora_column_scale(weight, a, b, magnitude)
    given = {"norm_and_scale": (norm, scale), "bias": bias}
    with forced("dora_linear", "own_product"):
        training = lk.dora_linear(x, weight, a, b, magnitude.requires_grad_(), **given)
        assert training.requires_grad
        with torch.no_grad():
            assert torch.equal(lk.dora_linear(x, weight, a, b, magnitude, **given), training)


# ------------------------------------------------------------------------------------------------------ many adapters


def many(rows=(6,), dtype=torch.float32, ids=torch.int64, dora=False):
    generator = torch.Generator().manual_seed(0)
    factors = []
    for rank in (4, 1, 7):
        shapes = ((rank, K), (N, rank), *(((N,),) if dora else ()))
        a, b, *m = (torch.randn(*s, generator=generator).to(dtype) / 8 for s in shapes)
        factors.append((a, b, 0.5, *m))
    x, weight = (torch.randn(*s, generator=generator).to(dtype) / 8 for s in ((*rows, K), (N, K)))
    which = torch.randint(-1, 3, rows, generator=generator).to(ids)
    return x, weight, lk.LoRAStack.from_factors(factors), which


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (6,), (2, 3), (0,), (70,)])
@pytest.mark.parametrize("choice", ["own_product", "library_product"])
def test_many_adapters_past_the_op_have_its_bits(choice, rows, dtype, monkeypatch):
    bias = torch.randn(N).to(dtype)
    with forced("multi_lora_linear", choice):
        for ids in (torch.int32, torch.int64):
            x, weight, stack, which = many(rows, dtype, ids)
            known = lk.multi_lora_linear(x, weight, stack, which, bias, backend="cpu")
            with monkeypatch.context() as patch:
                patch.setattr(functional, "call_multi_lora_linear", pytest.fail)
                column = which.reshape(-1, 1)
                for way_in in (which, column, lk.plan_batch(column, 3)):
                    assert torch.equal(lk.multi_lora_linear(x, weight, stack, way_in, bias), known)


def test_many_adapters_that_need_the_op(monkeypatch):
    x, weight, stack, which = many()
    went = []
    call = functional.call_multi_lora_linear
    monkeypatch.setattr(functional, "call_multi_lora_linear", lambda *a: went.append(1) or call(*a))
    lk.multi_lora_linear(x, weight, stack, which)
    assert not went
    lk.multi_lora_linear(x.clone().requires_grad_(), weight, stack, which)
    lk.multi_lora_linear(x, weight, stack, which, weights=torch.ones(6, 1))
    lk.multi_lora_linear(x, weight, stack, which, dropout_p=[0.0, 0.5, 0.0])
    lk.multi_lora_linear(x, weight, many(dora=True)[2], which)
    lk.multi_lora_linear(x, weight, stack, torch.stack([which, which], 1))
    lk.multi_lora_linear(x.repeat(1, 2)[:, :K], weight, stack, which)
    with torch.autocast("cpu", torch.bfloat16):
        lk.multi_lora_linear(x, weight, stack, which)
    assert len(went) == 7
    before = x.clone()
    for wrong, message in (
        ((x, weight, stack, which + 3), "expected adapter_ids from -1 to 2"),
        ((x, weight, stack, which[1:]), "expected adapter_ids of x's leading shape"),
        ((x, weight, stack, which.float()), "tensor of integers"),
        ((x[:, 1:], weight, stack, which), "expected x of shape"),
        ((x, weight[1:], stack, which), "expected a stack for"),
        ((x, weight, stack, lk.plan_batch(which, 4)), "expected a plan for 3 adapters, got one for 4"),
        ((None, weight, stack, which), "expected x to be a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            lk.multi_lora_linear(*wrong)
    assert torch.equal(x, before)
    assert multi_op.multi_lora_linear_directly(x, weight, stack.lora_a, stack.lora_b, stack.table, stack.scalings,
                                               which.to("meta"), None) is None  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_past_the_op_has_its_bits_and_is_noticed(dtype, factors, monkeypatch):
    _, weight, a, b, *_ = operands(dtype=dtype, factors=factors).values()
    known = lk.merge_lora_(weight.clone(), a, b, scaling=0.7, backend="cpu")
    monkeypatch.setattr(lk.merge, "call_merge_lora_", pytest.fail)
    for trains in (False, True):
        ours = weight.clone().requires_grad_(trains)
        version = ours._version
        assert lk.merge_lora_(ours, a.clone().requires_grad_(trains), b, scaling=0.7) is ours
        assert torch.equal(ours.detach(), known) and ours._version > version and ours.requires_grad is trains
        assert ours.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(lk.merge_lora_(weight.clone(), a, b, scaling=0.7), known)
    merged = lk.merge_lora_(weight.clone(), torch.full_like(a, torch.nan), b, check_finite=False)
    assert merged.isnan().all()


def test_merges_that_need_the_op():
    _, weight, a, b, *_ = operands().values()
    known = lk.merge_lora_(weight.clone(), a, b)
    for w, *factors in (
        (weight.T.contiguous().T, a, b), (weight.clone(), a.double(), b), (weight.clone(), a.T.contiguous().T, b)
    ):  # fmt: skip
        assert not merge_op.merges_directly(w, *factors)
        torch.testing.assert_close(lk.merge_lora_(w, *factors), known)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lk.merge_lora_(weight.clone(), a, b), known)
    before = weight.clone()
    for wrong, message in (
        ((weight, a, torch.full_like(b, torch.inf)), "lora_b holds NaN or Inf"),
        ((weight, a[:, 1:], b), "expected lora_a of shape"),
        ((weight, a, b.int()), "expected lora_b to be a tensor of a floating dtype"),
        ((weight[:1].expand(N, K), a, b), "expected a weight of its own memory"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            lk.merge_lora_(*wrong)
    assert torch.equal(weight, before)


def test_a_merge_stays_exact_where_products_may_be_rounded_to_bfloat16():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((512, 512), (64, 512), (512, 64)))
    exact = weight.double() + b.double() @ a.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # with which weight.addmm(b, a) is 0.1 off on some processors
    try:
        ours = lk.merge_lora_(weight.clone(), a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-4)
