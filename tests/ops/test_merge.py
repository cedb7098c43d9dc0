"""Merging into a weight: every backend against float64, both roundings, and W untouched after an error.

tests/ops/test_instruction_sets.py runs the `core` tests of this file on the lower instruction sets too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.reference import merge_lora_ref, round_stochastically_ref
from tests.tolerance import assert_as_exact_as_eager

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SEED = -0x1234_5678_9ABC_DEF0
SCALING = 0.75
BACKENDS = ["reference", "cpu"] if _extension.has_op("merge_rows_") else ["reference"]
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    BACKENDS = ["triton"]  # tests/interpreter/test_merge.py runs those tests that take a backend
SIZES = [(1, 1, 1), (3, 45, 7), (33, 130, 16), (70, 600, 65), (530, 33, 5)]


def operands(n: int, k: int, r: int, dtype: torch.dtype = F32, factors: torch.dtype = F32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n + 7 * k + 31 * r)
    w, a, b = (torch.randn(*shape, generator=generator) for shape in ((n, k), (r, k), (n, r)))
    return w.to(dtype), a.to(factors), (b / r**0.5).to(factors)


def row_scales(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, generator=generator) + 0.5, torch.randn(n, generator=generator)


def _dtypes(backend: str) -> Iterator[Any]:
    """All pairs; of the interpreter, which is slow, each dtype of W and of the factors once, and the others nightly."""
    first = {(F32, BF16), (BF16, F16), (F16, F32)}
    for pair in itertools.product([F32, BF16, F16], repeat=2):
        later = backend == "triton" and pair not in first
        yield pytest.param(*pair, backend, marks=pytest.mark.nightly if later else ())


@pytest.mark.parametrize(
    ("dtype", "factors", "backend"), [case for backend in BACKENDS for case in _dtypes(backend)], ids=str
)
def test_core_as_exact_as_eager(dtype: torch.dtype, factors: torch.dtype, backend: str) -> None:
    for size in SIZES:
        w, a, b = operands(*size, dtype, factors)
        before, after = row_scales(size[0])
        wide = w.double() + SCALING * (b.double() @ a.double())
        # Eager rounds nothing but the sum either: W widened, the product in float32.
        eager = (w.float() + SCALING * (b.float() @ a.float())).to(dtype)
        ours = w.clone()
        assert lk.merge_lora_(ours, a, b, scaling=SCALING, backend=backend) is ours
        assert_as_exact_as_eager(ours, eager, wide, what=f"merge {size}")
        if dtype == F32:
            lk.merge_lora_(ours, a, b, scaling=-SCALING, backend=backend)
            torch.testing.assert_close(ours, w, rtol=0, atol=4e-6)
        ours = w.clone()
        lk.merge_dora_(ours, a, b, after, scaling=SCALING, backend=backend)
        eager = (after[:, None] * (w.float() + SCALING * (b.float() @ a.float()))).to(dtype)
        assert_as_exact_as_eager(ours, eager, after.double()[:, None] * wide, what=f"scaled merge {size}")
        ours = w.clone()
        lk.unmerge_dora_(ours, a, b, before, scaling=SCALING, backend=backend)
        inverse = (1.0 / before).double()[:, None]
        eager = (inverse.float() * w.float() - SCALING * (b.float() @ a.float())).to(dtype)
        wide = inverse * w.double() - SCALING * (b.double() @ a.double())
        assert_as_exact_as_eager(ours, eager, wide, what=f"scaled unmerge {size}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_stochastic_rounding_draws_the_published_bits(backend: str) -> None:
    """Sums that float32 holds exactly: every backend must give the reference's very bits."""
    for n, k in ((1, 1), (5, 31), (66, 517), (600, 40)):
        generator = torch.Generator().manual_seed(k)
        w = torch.randint(-128, 128, (n, k), generator=generator).to(BF16)
        a = torch.randint(-64, 64, (3, k), generator=generator) / 2.0**12
        b = torch.randint(-4, 5, (n, 3), generator=generator).float()
        exact = w.float() + b @ a
        assert torch.equal(exact.double(), w.double() + b.double() @ a.double())
        ours = lk.merge_lora_(w.clone(), a, b, rounding="stochastic", seed=SEED, backend=backend)
        assert torch.equal(ours, round_stochastically_ref(exact, torch.tensor(SEED)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_special_values(backend: str) -> None:
    w = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, 1.0]] * 3).to(BF16)
    w[2].view(torch.int16)[0] = 0x7FFF  # a NaN whose last bit would carry into the sign
    a, b = torch.zeros(2, 5), torch.zeros(3, 2)
    for rounding in ("nearest", "stochastic"):
        ours = lk.merge_lora_(w.clone(), a, b, rounding=rounding, seed=3, backend=backend)
        assert ours[:, 0].isnan().all()
        assert torch.equal(ours[:, 1:], w[:, 1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_empty(backend: str) -> None:
    for dtype in (F32, BF16):
        w, a, b = operands(35, 70, 7, dtype)
        expected = lk.merge_lora_(w.clone(), a, b, scaling=SCALING, backend=backend)
        apart = torch.full((35, 80), float("nan"), dtype=dtype)
        apart[:, 4:74] = w
        lk.merge_lora_(apart[:, 4:74], a.T.contiguous().T, b.T.contiguous().T, scaling=SCALING, backend=backend)
        assert torch.equal(apart[:, 4:74], expected)
        assert apart[:, :4].isnan().all() and apart[:, 74:].isnan().all()
        transposed = w.T.contiguous().T
        lk.merge_lora_(transposed, a, b, scaling=SCALING, backend=backend)
        # In float32 the sum is the library's, whose order may follow the layout.
        torch.testing.assert_close(transposed, expected, rtol=0.0, atol=1e-6 if dtype == F32 else 0.0)
        assert transposed.stride() == (1, 35)
        for n, k in ((0, 5), (5, 0)):
            empty = torch.empty(n, k, dtype=dtype)
            assert lk.merge_lora_(empty, torch.ones(2, k), torch.ones(n, 2), backend=backend) is empty


def test_the_oracle_is_the_formula() -> None:
    w, a, b = operands(9, 14, 3, F64, F64)
    before, after = (t.double() for t in row_scales(9))
    torch.testing.assert_close(
        merge_lora_ref(w, a, b, scaling=SCALING, before=before, after=after),
        after[:, None] * (before[:, None] * w + SCALING * b @ a),
        rtol=1e-15,
        atol=1e-15,
    )


def test_stochastic_rounding_keeps_the_mean_and_stays_beside_the_value() -> None:
    value = 1.0 + 0.3 * 2.0**-7  # three tenths of the way from 1 to the next bfloat16
    exact = torch.full((512, 512), value)
    rounded = round_stochastically_ref(exact, torch.tensor(1)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(rounded.mean().item() - value) < 5 * 2.0**-7 * (0.3 * 0.7) ** 0.5 / 512
    # Rows count from the start of the matrix.
    assert torch.equal(round_stochastically_ref(exact[7:], torch.tensor(1), first_row=7), rounded[7:].to(BF16))


def test_small_updates_survive_stochastic_rounding_alone() -> None:
    nearest, stochastic = torch.ones(64, 64, dtype=BF16), torch.ones(64, 64, dtype=BF16)
    a, b = torch.full((1, 64), 2.0**-12), torch.ones(64, 1)
    for step in range(256):
        lk.merge_lora_(nearest, a, b)
        lk.merge_lora_(stochastic, a, b, rounding="stochastic", seed=step)
    assert torch.equal(nearest, torch.ones_like(nearest))  # 256 updates of 1/32 ulp, each rounded away
    assert abs(stochastic.float().mean().item() - (1 + 256 / 4096)) < 5e-3


def test_threads_and_repeats_give_the_same_bits() -> None:
    w, a, b = operands(1100, 1100, 24, BF16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            for rounding in ("nearest", "stochastic"):
                results.append(lk.merge_lora_(w.clone(), a, b, rounding=rounding, seed=5))
    finally:
        torch.set_num_threads(before)
    for i in range(2, len(results)):
        assert torch.equal(results[i], results[i % 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_write_is_noticed(backend: str) -> None:
    """Autograd's version counter moves, so that stale saved tensors and caches are found."""
    w, a, b = operands(6, 8, 2)
    w.requires_grad_()
    version = w._version
    lk.merge_lora_(w, a, b, backend=backend)
    assert w._version > version and w.grad_fn is None
    with torch.inference_mode():
        lk.merge_lora_(torch.zeros(6, 8), a, b, backend=backend)


def test_without_a_seed_the_generator_decides() -> None:
    w, a, b = operands(40, 40, 2, BF16)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(lk.merge_lora_(w.clone(), a, b, rounding="stochastic"))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_compiles_whole() -> None:
    w, a, b = operands(16, 24, 4)

    def merged(weight: Tensor) -> Tensor:
        return lk.merge_lora_(weight.clone(), a, b, check_finite=False) * 2

    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(w), merged(w))


EXPANDED = torch.zeros(1, 8).expand(6, 8)
MESSAGES: list[tuple[Callable[[Tensor], object], type[Exception], str]] = [
    (
        lambda w: lk.merge_lora_(w, torch.zeros(2, 7), torch.zeros(6, 2)),
        ValueError,
        r"lora_a of shape \(R, K\) = \(2, 8\), got \(2, 7\)",
    ),
    (
        lambda w: lk.merge_lora_(w, torch.zeros(2, 8), torch.zeros(6, 3)),
        ValueError,
        r"lora_b of shape \(N, R\) = \(6, 2\), got \(6, 3\)",
    ),
    (lambda w: lk.merge_lora_(w, torch.zeros(8), torch.zeros(6, 2)), ValueError, r"lora_a with 2 dimensions"),
    (lambda w: lk.merge_lora_(w, [1.0], torch.zeros(6, 2)), TypeError, "lora_a to be a tensor of a floating dtype"),
    (lambda w: lk.merge_lora_(w.int(), torch.zeros(2, 8), torch.zeros(6, 2)), TypeError, "weight to be a tensor"),
    (lambda w: lk.merge_lora_(EXPANDED, torch.zeros(2, 8), torch.zeros(6, 2)), ValueError, "of its own memory"),
    (lambda w: lk.merge_lora_(w, torch.full((2, 8), float("nan")), torch.zeros(6, 2)), ValueError, "lora_a holds NaN"),
    (lambda w: lk.merge_lora_(w, torch.zeros(2, 8), torch.full((6, 2), float("inf"))), ValueError, "lora_b holds NaN"),
    (
        lambda w: lk.merge_lora_(w, torch.zeros(2, 8), torch.zeros(6, 2), rounding="up"),
        ValueError,
        "rounding to be one of nearest, stochastic, got 'up'",
    ),
    (
        lambda w: lk.merge_lora_(w, torch.zeros(2, 8), torch.zeros(6, 2), rounding="stochastic"),
        ValueError,
        "bfloat16 weight for stochastic rounding, got torch.float32",
    ),
    (lambda w: lk.merge_lora_(w, torch.zeros(2, 8), torch.zeros(6, 2), backend="rocket"), ValueError, "backend to be"),
    (lambda w: lk.merge_lora_(w, torch.zeros(2, 8), torch.zeros(6, 2), backend="cuda"), ValueError, "cannot run here"),
]


@pytest.mark.parametrize(("call", "error", "message"), MESSAGES)
def test_messages_and_a_weight_that_stays(call, error, message) -> None:  # type: ignore[no-untyped-def]
    weight = torch.randn(6, 8)
    before = weight.clone()
    with pytest.raises(error, match=rf"^merge_lora_: .*{message}"):
        call(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dora", [False, True])
def test_a_sum_beyond_float16s_range_is_refused_and_leaves_the_weight(dora: bool) -> None:
    """Infinity could not be taken out again. A bound that is too large refuses nothing by itself."""
    w, a, b = torch.full((4, 8), 6e4).half(), torch.zeros(2, 8), torch.zeros(4, 2)
    a[0, 0], b[3, 0] = 100.0, 100.0
    before = w.clone()
    merge = (lambda: lk.merge_dora_(w, a, b, torch.ones(4))) if dora else (lambda: lk.merge_lora_(w, a, b))
    with pytest.raises(ValueError, match="within float16's range"):
        merge()
    assert torch.equal(w, before)
    a[0, 0] = -100.0  # now the one large element shrinks
    merge()
    assert w[3, 0] == 5e4 and torch.isfinite(w).all()


def test_a_merge_stays_exact_where_products_may_be_rounded_to_bfloat16() -> None:
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
