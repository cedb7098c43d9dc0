"""GaLore's step: every backend against float64, moments too, layouts, and nothing written after an error.

tests/ops/test_instruction_sets.py runs the `core` tests of this file on the lower instruction sets too.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.reference import galore_adam_ref, rotate_moments_ref
from tests.problems.galore import SETTINGS, eager_step, galore_tensors, stepped
from tests.problems.lora import BF16, F16, F32
from tests.tolerance import assert_as_exact_as_eager

BACKENDS = ["reference", "cpu"] if _extension.has_op("galore_step_") else ["reference"]
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    BACKENDS = ["triton"]  # tests/interpreter/test_galore.py runs those tests that take a backend
SIZES = [(1, 1, 1), (45, 7, 3), (130, 33, 16), (600, 70, 65), (33, 210, 130), (77, 150, 20)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_core_weight_and_moments_are_as_exact_as_eager(dtype: torch.dtype, tall: bool, backend: str) -> None:
    for size in SIZES:
        t = galore_tensors(size, dtype)
        if tall:
            t = {name: v.mT.contiguous().mT for name, v in t.items()}
        exact = eager_step({name: v.double() for name, v in t.items()})
        for what, ours, eager, oracle in zip(("W", "m", "v"), stepped(t, backend), eager_step(t), exact, strict=True):
            assert_as_exact_as_eager(ours, eager, oracle, what=f"{what} of {size}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_a_step_writes_its_own_elements_alone(backend: str) -> None:
    t = galore_tensors((70, 35, 9), F32)
    expected = stepped(t, backend)
    around = {name: torch.full((v.shape[0] + 3, v.shape[1] + 10), float("nan")) for name, v in t.items()}
    inside = {name: around[name][1:-2, 4:-6].copy_(v) for name, v in t.items()}
    lk.galore_adam_(**inside, **SETTINGS, backend=backend)
    for name, after in zip(("weight", "exp_avg", "exp_avg_sq"), expected, strict=True):
        assert torch.equal(inside[name], after), name
        inside[name].fill_(float("nan"))
        assert around[name].isnan().all()
    for name in ("grad", "basis"):
        assert torch.equal(inside[name], t[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tall", [False, True])
def test_core_nan_and_infinity_stay_in_their_column(tall: bool, backend: str) -> None:
    """A column of G is a column of the projection, and of W."""
    t = galore_tensors((40, 20, 5), F32)
    t["grad"][3, 7], t["grad"][4, 30] = float("nan"), float("inf")
    if tall:
        t = {name: v.mT.contiguous().mT for name, v in t.items()}
    for after in stepped(t, backend):
        bad = (~after.isfinite()).any(0)
        assert bad.nonzero().flatten().tolist() == [7, 30]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_decay_and_with_a_first_step(backend: str) -> None:
    """m = v = 0 before: each coordinate of the projection moves by one unit, whatever its size."""
    t = galore_tensors((30, 30, 30), F32)
    t |= {"weight": torch.zeros(30, 30), "exp_avg": torch.zeros(30, 30), "exp_avg_sq": torch.zeros(30, 30)}
    t["basis"] = torch.eye(30)
    lk.galore_adam_(**t, step=1, lr=1.0, scale=1.0, backend=backend)
    torch.testing.assert_close(t["weight"], -t["grad"].sign(), rtol=0, atol=1e-4)


def test_the_oracle_is_the_formula() -> None:
    t = {name: v.double() for name, v in galore_tensors((14, 9, 3), F32).items()}
    exact = eager_step(t)
    galore_adam_ref(**t, **SETTINGS, betas=(0.9, 0.999), eps=1e-8)
    for ours, expected in zip((t["weight"], t["exp_avg"], t["exp_avg_sq"]), exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)


def test_moments_turn_with_the_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    old, turn = q[:, :3], torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    m, v = torch.randn(3, 5, generator=generator).double(), torch.rand(3, 5, generator=generator).double()
    before = old @ m
    rotate_moments_ref(m, v, old, old @ turn)
    torch.testing.assert_close(old @ turn @ m, before)
    same = v.clone()
    rotate_moments_ref(m, v, old, old)
    torch.testing.assert_close(v, same)


def test_threads_and_repeats_give_the_same_bits() -> None:
    before, t = torch.get_num_threads(), galore_tensors((700, 400, 24), BF16)
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            for tall in (False, True):
                results.append(stepped({n: v.mT.contiguous().mT for n, v in t.items()} if tall else t, "auto"))
    finally:
        torch.set_num_threads(before)
    for i in range(2, len(results)):
        assert all(torch.equal(a, b) for a, b in zip(results[i], results[i % 2], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_write_is_noticed(backend: str) -> None:
    """Autograd's version counters move, so that stale saved tensors and caches are found."""
    t = galore_tensors((8, 6, 2), F32)
    t["weight"].requires_grad_()
    versions = {name: v._version for name, v in t.items()}
    lk.galore_adam_(**t, **SETTINGS, backend=backend)
    assert {name for name, v in t.items() if v._version > versions[name]} == {"weight", "exp_avg", "exp_avg_sq"}
    assert t["weight"].grad_fn is None


def test_compiles_whole() -> None:
    t = galore_tensors((24, 16, 4), F32)

    def after(weight: Tensor) -> Tensor:
        w, m, v = weight.clone(), t["exp_avg"].clone(), t["exp_avg_sq"].clone()
        lk.galore_adam_(w, t["grad"], t["basis"], m, v, **SETTINGS)
        return w * 2

    torch._dynamo.reset()
    compiled = torch.compile(after, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(t["weight"]), after(t["weight"]))


MESSAGES = [
    ({"grad": torch.zeros(6, 9)}, ValueError, r"grad of shape \(N, K\) = \(6, 8\), got \(6, 9\)"),
    ({"basis": torch.zeros(5, 2)}, ValueError, r"basis of shape \(N, R\) = \(6, 2\), got \(5, 2\)"),
    ({"exp_avg": torch.zeros(3, 8)}, ValueError, r"exp_avg of shape \(R, K\) = \(2, 8\), got \(3, 8\)"),
    ({"exp_avg_sq": torch.zeros(2, 8).bfloat16()}, TypeError, "exp_avg_sq of dtype torch.float32"),
    ({"weight": torch.zeros(1, 8).expand(6, 8)}, ValueError, "weight of its own memory"),
    ({"weight": torch.zeros(8)}, ValueError, r"weight of shape \(N, K\), got \(8,\)"),
    ({"basis": torch.zeros(6, 0)}, ValueError, ""),
    ({"basis": torch.zeros(6, 7), "exp_avg": torch.zeros(7, 8), "exp_avg_sq": torch.zeros(7, 8)}, ValueError, "1 to N"),
    ({"backend": "cuda"}, ValueError, ""),
]


@pytest.mark.parametrize(("changes", "error", "message"), MESSAGES)
def test_messages_and_a_weight_that_stays(changes, error, message) -> None:  # type: ignore[no-untyped-def]
    t = {**galore_tensors((8, 6, 2), F32), **changes}
    before = {name: v.clone() for name, v in t.items() if isinstance(v, Tensor)}
    with pytest.raises(error, match=rf"^galore_adam_: .*{message}"):
        lk.galore_adam_(**t, step=1)
    assert all(torch.equal(t[name], v) for name, v in before.items())
