"""Calls that go past this package's ops: when they do, that nobody can tell, and that nothing is checked less."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_kernels as lk
from lowrank_kernels import _extension, functional, tuned
from lowrank_kernels.ops import lora
from lowrank_kernels.ops.multi_lora import MultiLoRALinear
from lowrank_kernels.ops.planning import plan
from lowrank_kernels.reference import lora_linear_ref
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
        .to(dtype if name in ("x", "weight") or factors is None else factors)
        .requires_grad_(name in trained)
        for name, size in sizes.items()
    }


def way(**given):
    """What a call goes through: "op", "eager", or neither, the extension's one call: "direct"."""
    went = []
    with pytest.MonkeyPatch.context() as patch:
        for name, word in (("call_lora_linear", "op"), ("lora_linear_eager", "eager")):
            function = getattr(functional, name)
            patch.setattr(functional, name, lambda *a, f=function, w=word, **k: went.append(w) or f(*a, **k))
        lk.lora_linear(**given)
    return went[0] if went else "direct"


OWN, LIBRARY = {"base": "own"}, {"base": "library"}


@contextmanager
def forced(op, fields):
    with tuned.forcing(op) as force:
        force(fields)
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


def test_the_one_call_takes_rows_that_lie_apart():
    x, weight, a, b, *_ = operands((10,)).values()
    apart = torch.cat([x, x], dim=1)[:, :K]
    assert torch.equal(
        CPP.lora_linear_inference(apart, weight, a, b, None, None, 1.0, None),
        CPP.lora_linear_inference(x, weight, a, b, None, None, 1.0, None),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, a, b: (x.view(2, 5, K).transpose(0, 1), w, a, b, None), "contiguous where it is no matrix"),
        (lambda x, w, a, b: (x[:, 1:], w, a, b, None), "expected x of 96 columns"),
        (lambda x, w, a, b: (torch.tensor(1.0), w, a, b, None), "expected x of 96 columns"),
        (lambda x, w, a, b: (x, w, a[:, 1:], b, None), "expected factor of shape"),
        (lambda x, w, a, b: (x, w, a, b[1:], None), r"expected lora_b of shape \(N, R\) = \(80, 7\), got \(79, 7\)"),
        (lambda x, w, a, b: (x, w, a, b, torch.ones(3)), "expected bias of shape"),
    ],
)
def test_the_one_call_refuses_what_does_not_fit(change, message):
    x, weight, a, b, *_ = operands((10,)).values()
    with pytest.raises(RuntimeError, match=message):
        CPP.lora_linear_inference(*change(x, weight, a, b), None, 1.0, None)


def test_the_sizes_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(lora, "REMEMBERED", 3)
    held = []
    with forced("lora_linear", OWN), torch.no_grad():
        for rows in range(1, 9):
            given = operands((rows,))
            assert way(**given) == "direct"
            held.append(len(lora._DIRECT))
    assert held == [1, 2, 3, 1, 2, 3, 1, 2]


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


@pytest.fixture
def own_product():
    """The extension's own product is what the table chooses."""
    with forced("lora_linear", OWN):
        yield


@pytest.mark.usefixtures("own_product")
@pytest.mark.parametrize("rows", [(5,), (2, 3)])
def test_a_call_without_gradients_goes_past_the_op(rows):
    assert [way(**operands(rows)) for _ in range(2)] == ["direct"] * 2


@pytest.mark.usefixtures("own_product")
@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "bias", "gate"])
def test_a_call_that_records_gradients_takes_the_op_and_the_same_without_goes_past_it(name):
    training = operands(trained=(name,))
    assert way(**training) == "op"
    with torch.no_grad():
        assert way(**training) == "direct"


@pytest.mark.usefixtures("own_product")
def test_strides_that_the_one_call_does_not_take_need_the_op():
    given = operands()
    assert way(**(given | {"x": given["x"].repeat(1, 2)[:, :K].view(1, 5, K)})) == "op"
    assert way(**(given | {"weight": given["weight"].T.contiguous().T})) == "op"


@pytest.mark.usefixtures("own_product")
def test_a_dtype_that_the_one_call_does_not_take_needs_the_op():
    given = operands()
    assert way(**(given | {"lora_a": given["lora_a"].double()})) == "op"


class Listening(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("own_product")
@pytest.mark.parametrize(
    "listener",
    [Listening, torch.autograd.profiler.profile, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["dispatch mode", "profiler", "autocast"],
)
def test_the_op_is_called_while_something_listens(listener):
    given = operands()
    with listener():
        assert way(**given) == "op"


@pytest.mark.parametrize("fields", [LIBRARY, {"backend": "reference"}])
def test_choices_that_are_the_ops_own_take_the_op(fields):
    with forced("lora_linear", fields):
        assert way(**operands()) == "op"


def test_meta_tensors_take_the_op():
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


def test_autocast_takes_two_dtypes_which_stay_wrong_outside_it():
    given = operands(trained=("lora_a",))
    mixed = given | {"x": given["x"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
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
    with forced("dora_linear", OWN):
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
@pytest.mark.parametrize("rows", [(1,), (6,), (2, 3), (70,)])
@pytest.mark.parametrize("choice", [OWN, LIBRARY])
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


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_many_adapters_of_no_row(rows):
    x, weight, stack, which = many(rows)
    assert lk.multi_lora_linear(x, weight, stack, which).shape == (*rows, N)


@pytest.fixture
def many_calls_of_the_op(monkeypatch):
    """A list that grows with each call that reaches the op."""
    went = []
    call = functional.call_multi_lora_linear
    monkeypatch.setattr(functional, "call_multi_lora_linear", lambda *a, **k: went.append(1) or call(*a, **k))
    return went


def test_many_adapters_in_inference_go_past_the_op(many_calls_of_the_op):
    lk.multi_lora_linear(*many())
    assert not many_calls_of_the_op


@pytest.mark.parametrize(
    "change",
    [
        lambda x, which: {"x": x.requires_grad_()},
        lambda x, which: {"weights": torch.ones(6, 1)},
        lambda x, which: {"dropout_p": [0.0, 0.5, 0.0]},
        lambda x, which: {"stack": many(dora=True)[2]},
        lambda x, which: {"adapter_ids": torch.stack([which, which], 1)},
        lambda x, which: {"x": x.repeat(1, 2)[:, :K]},
    ],
    ids=["gradients", "weights", "dropout", "dora", "several a row", "strides"],
)
def test_many_adapters_with_more_than_the_one_call_does_take_the_op(change, many_calls_of_the_op):
    x, weight, stack, which = many()
    given = {"x": x, "weight": weight, "stack": stack, "adapter_ids": which}
    lk.multi_lora_linear(**(given | change(x, which)))
    assert len(many_calls_of_the_op) == 1


def test_many_adapters_under_autocast_take_the_op(many_calls_of_the_op):
    with torch.autocast("cpu", torch.bfloat16):
        lk.multi_lora_linear(*many())
    assert len(many_calls_of_the_op) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, stack, ids: (x, w, stack, ids + 3), "expected adapter_ids from -1 to 2"),
        (lambda x, w, stack, ids: (x, w, stack, ids[1:]), "expected adapter_ids of x's leading shape"),
        (lambda x, w, stack, ids: (x, w, stack, ids.float()), "tensor of integers"),
        (lambda x, w, stack, ids: (x[:, 1:], w, stack, ids), "expected x of shape"),
        (lambda x, w, stack, ids: (x, w[1:], stack, ids), "expected a stack for"),
        (
            lambda x, w, stack, ids: (x, w, stack, lk.plan_batch(ids, 4)),
            "expected a plan for 3 adapters, got one for 4",
        ),
        (lambda x, w, stack, ids: (None, w, stack, ids), "expected x to be a tensor"),
    ],
)
def test_many_adapters_that_do_not_fit_are_refused(change, message):
    given = many()
    before = given[0].clone()
    lk.multi_lora_linear(*given)
    with pytest.raises((TypeError, ValueError), match=message):
        lk.multi_lora_linear(*change(*given))
    assert torch.equal(given[0], before)


def test_many_adapters_on_several_devices_are_not_for_the_one_call():
    x, weight, stack, which = many()
    with pytest.raises(ValueError, match="expected adapter_ids on cpu like x, got meta"):
        lk.multi_lora_linear(x, weight, stack, which.to("meta"))


def test_a_plan_says_that_rows_need_no_sorting_and_a_call_goes_past_the_op():
    x, weight, stack, which = many()
    of_stack = stack.lora_a, stack.lora_b, None, None, stack.table, stack.scalings, stack.max_rank, None
    made = plan("multi_lora_linear", MultiLoRALinear(x, weight, *of_stack, which, *(None,) * 8, False, False, "auto"))
    assert made.unsorted and made.direct


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_past_the_dispatcher_has_its_bits(dtype, factors):
    _, weight, a, b, *_ = operands(dtype=dtype, factors=factors).values()
    known = lk.merge_lora_(weight.clone(), a, b, scaling=0.7, backend="cpu")
    assert torch.equal(lk.merge_lora_(weight.clone(), a, b, scaling=0.7), known)
    with torch.inference_mode():
        assert torch.equal(lk.merge_lora_(weight.clone(), a, b, scaling=0.7), known)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_past_the_dispatcher_is_noticed_by_autograd(dtype, factors, trains):
    _, weight, a, b, *_ = operands(dtype=dtype, factors=factors).values()
    known = lk.merge_lora_(weight.clone(), a, b, scaling=0.7, backend="cpu")
    ours = weight.clone().requires_grad_(trains)
    version = ours._version
    assert lk.merge_lora_(ours, a.clone().requires_grad_(trains), b, scaling=0.7) is ours
    assert torch.equal(ours.detach(), known) and ours._version > version and ours.requires_grad is trains
    assert ours.grad_fn is None


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_past_the_dispatcher_takes_nan_where_it_is_told_to(dtype, factors):
    _, weight, a, b, *_ = operands(dtype=dtype, factors=factors).values()
    assert lk.merge_lora_(weight.clone(), torch.full_like(a, torch.nan), b, check_finite=False).isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda w, a, b: (w.T.contiguous().T, a, b),
        lambda w, a, b: (w, a.double(), b),
        lambda w, a, b: (w, a.T.contiguous().T, b),
    ],
    ids=["strides of the weight", "dtype of a factor", "strides of a factor"],
)
def test_a_merge_of_what_lies_otherwise_has_its_result(change):
    _, weight, a, b, *_ = operands().values()
    known = lk.merge_lora_(weight.clone(), a, b)
    given = change(weight.clone(), a, b)
    torch.testing.assert_close(lk.merge_lora_(*given), known)


def test_autocast_changes_no_bit_of_a_merge():
    _, weight, a, b, *_ = operands().values()
    known = lk.merge_lora_(weight.clone(), a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lk.merge_lora_(weight.clone(), a, b), known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, a, b: (w, a, torch.full_like(b, torch.inf)), "lora_b holds NaN or Inf"),
        (lambda w, a, b: (w, a[:, 1:], b), "expected lora_a of shape"),
        (lambda w, a, b: (w, a, b.int()), "expected lora_b to be a tensor of a floating dtype"),
        (lambda w, a, b: (w[:1].expand(N, K), a, b), "expected a weight of its own memory"),
    ],
)
def test_a_merge_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    _, weight, a, b, *_ = operands().values()
    before = weight.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        lk.merge_lora_(*change(weight, a, b))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("given", [(), ("bias",), ("gate",), ("bias", "gate")], ids="-".join)
def test_a_call_that_ran_before_is_not_planned_again_and_gives_the_same(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(11)
    shapes = {"x": (3, 72), "weight": (40, 72), "lora_a": (5, 72), "lora_b": (40, 5), "bias": (40,), "gate": (5,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    operands = {name: t for name, t in tensors.items() if name in ("x", "weight", "lora_a", "lora_b", *given)}
    with torch.no_grad():
        known = lk.lora_linear(**operands, scaling=0.7, backend="cpu")
        lk.lora_linear(**operands, scaling=1.3)

        def refuse(call: object) -> None:
            raise AssertionError("planned again")

        monkeypatch.setattr(functional, "plan_lora_linear", refuse)
        again = lk.lora_linear(**operands, scaling=0.7)
    assert torch.equal(again, known)
    assert not torch.allclose(known, lora_linear_ref(**operands, scaling=0.75)[0])
