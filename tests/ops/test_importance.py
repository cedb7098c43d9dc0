"""LoRAPrune's importance: every backend against float64, whatever the layout; NaN, infinity, and no gradient.

tests/ops/test_instruction_sets.py runs the `core` tests of this file on the lower instruction sets too.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.ops.importance import LoRAImportance, plan_lora_importance
from tests.problems.importance import eager_importance, importance_tensors
from tests.tolerance import assert_as_exact_as_eager

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = ["reference", "cpu"] if _extension.available() else ["reference"]
DIMS = ["rows", "columns"]
SIZES = [(1, 1, 1), (45, 3, 7), (130, 33, 16), (600, 70, 65), (33, 530, 5), (1100, 20, 3)]  # K, N, R
DTYPES = list(itertools.product([F32, BF16, F16], repeat=2))
if os.environ.get("TRITON_INTERPRET", "0") == "1":  # tests/interpreter/test_importance.py runs what takes a backend
    BACKENDS, SIZES, DTYPES = ["triton"], [(1, 1, 1), (70, 33, 16), (40, 70, 35)], [(BF16, F32), (F16, BF16)]
ON_EACH_DIM = pytest.mark.parametrize("dim", DIMS)
ON_EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def exact(t: dict[str, Tensor], scaling: float, dim: str) -> Tensor:
    return eager_importance({name: v.double() for name, v in t.items()}, scaling, dim)


@ON_EACH_DIM
@ON_EACH_BACKEND
@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
def test_core_as_exact_as_eager(dtype: torch.dtype, factors: torch.dtype, backend: str, dim: str) -> None:
    for sizes in SIZES:
        t = importance_tensors(sizes, dtype, factors)
        sums = lk.lora_importance(**t, scaling=-1.5, dim=dim, backend=backend)
        right = exact(t, -1.5, dim)
        assert_as_exact_as_eager(sums, eager_importance(t, -1.5, dim), right, what=f"{sizes}")
        if min(sizes[:2]) >= 20:
            torch.testing.assert_close(sums.double(), right, rtol=1e-6, atol=0)


@ON_EACH_DIM
@ON_EACH_BACKEND
def test_core_layouts(backend: str, dim: str) -> None:
    t = importance_tensors((90, 70, 8), F32, F32)
    known = lk.lora_importance(**t, dim=dim, backend=backend)
    gaps = torch.full((140, 181), torch.nan)[::2, 1::2]
    gaps.copy_(t["weight"])
    for weight in (gaps, t["weight"].T.contiguous().T, gaps.T.contiguous().T[:, :90]):
        for factors in ("lora_a", "lora_b"), ("lora_a", "lora_b", "grad_a", "grad_b"):
            turned = {name: t[name].T.contiguous().T for name in factors}
            torch.testing.assert_close(lk.lora_importance(**{**t, **turned, "weight": weight}, dim=dim), known)
    flat = {**t, "weight": t["weight"][:1].expand(70, 90)}
    sums = lk.lora_importance(**flat, dim=dim, backend=backend)
    torch.testing.assert_close(sums, exact(flat, 1.0, dim).float())


@ON_EACH_DIM
@ON_EACH_BACKEND
@pytest.mark.parametrize("name", ["weight", "lora_b"])
def test_core_nan_and_infinity_stay_in_their_row(name: str, backend: str, dim: str) -> None:
    """13 columns: those that fill up a register are no part of a sum."""
    t = {key: v.abs() + 0.1 for key, v in importance_tensors((13, 9, 4), F32, F32).items()}
    t["grad_a"] /= 2  # A - ∇A is positive
    for value in (torch.nan, torch.inf):
        changed = {**t, name: t[name].clone()}
        changed[name][5, 2] = value
        sums = lk.lora_importance(**changed, dim=dim, backend=backend)
        assert torch.equal(sums.isfinite(), exact(changed, 1.0, dim).isfinite())
        assert torch.equal(sums.isnan(), exact(changed, 1.0, dim).isnan())


@ON_EACH_DIM
def test_what_requires_grad_is_read_and_the_sums_do_not(dim: str) -> None:
    t = importance_tensors((40, 30, 4), F32, F32)
    known = lk.lora_importance(**t, dim=dim)
    trained = {name: v.clone().requires_grad_() for name, v in t.items()}
    sums = lk.lora_importance(**trained, dim=dim)
    assert torch.equal(sums, known) and not sums.requires_grad
    a = t["lora_a"]
    grad = torch.func.grad(lambda a: lk.lora_importance(**{**t, "lora_a": a}, dim=dim).sum())(a)
    assert not grad.any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@ON_EACH_DIM
def test_float64_stays_float64(dim: str, backend: str) -> None:
    t = {name: v.double() for name, v in importance_tensors((40, 30, 4), F32, F32).items()}
    sums = lk.lora_importance(**t, dim=dim, backend=backend)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, exact(t, 1.0, dim), rtol=1e-12, atol=0)


@ON_EACH_DIM
@pytest.mark.parametrize("kind", [lk.weights.NF4Weight, lk.weights.Int8Weight])
def test_a_weight_of_few_bits_is_read_some_rows_at_a_time(
    kind: type, dim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = importance_tensors((64, 96, 4), BF16, F32)
    stored = kind.from_dense(t["weight"])  # type: ignore[attr-defined]
    monkeypatch.setattr("lowrank_kernels.ops.importance._UNPACKED_AT_ONCE", 40 * 64)
    monkeypatch.setattr(kind, "dense", lambda self: pytest.fail("made dense"))
    sums = lk.lora_importance(**{**t, "weight": stored}, dim=dim)
    rows = torch.cat([stored.rows(i, i + 32) for i in (0, 32, 64)])
    torch.testing.assert_close(sums.double(), exact({**t, "weight": rows}, 1.0, dim), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_a": torch.zeros(8, 63)}, r"expected grad_a of shape \(R, K\) = \(8, 64\), got \(8, 63\)"),
        ({"grad_b": torch.zeros(7, 8)}, r"expected grad_b of shape \(N, R\) = \(32, 8\), got \(7, 8\)"),
        ({"lora_a": torch.zeros(0, 64)}, r"expected lora_b of shape \(N, R\) = \(32, 0\), got \(32, 8\)"),
        ({"lora_a": torch.zeros(64)}, r"expected lora_a of shape \(R, K\) = \(R, 64\), got \(64,\)"),
        ({"dim": "both"}, "expected dim to be one of rows, columns, got 'both'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    t: dict[str, object] = {**importance_tensors((64, 32, 8), F32, F32)}
    with pytest.raises(ValueError, match=f"^lora_importance: {message}"):
        lk.lora_importance(**(t | change))  # type: ignore[arg-type]


def test_torch_finds_nothing_wrong_with_the_op() -> None:
    t = importance_tensors((40, 30, 4), F32, F32)
    torch.library.opcheck(torch.ops.lowrank_kernels.lora_importance.default, (*t.values(), 1.0, "rows", "auto"))


def test_a_plan_says_what_runs() -> None:
    t = importance_tensors((40, 30, 4), F32, F32)
    plan = plan_lora_importance(LoRAImportance(*t.values(), 1.0, "rows", "reference"))  # type: ignore[arg-type]
    assert plan is not None and plan.backend == "reference" and plan.reasons[0].why == "named by the caller"
