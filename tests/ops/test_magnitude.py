"""Counts of magnitudes on every backend: as NumPy counts them, whatever the layout; infinity, NaN, and no gradient."""

from __future__ import annotations

import os

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import _extension
from tests.problems.magnitude import BINS, eager_counts, values_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = ["reference", "cpu"] if _extension.available() else ["reference"]
SHAPES: list[tuple[int, ...]] = [(1,), (4097,), (300, 5, 41), (3, 70001)]
if os.environ.get("TRITON_INTERPRET", "0") == "1":  # tests/interpreter/test_magnitude.py runs what takes a backend
    BACKENDS, SHAPES = ["triton"], [(1,), (4097,), (30, 5, 41)]
ON_EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@ON_EACH_BACKEND
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_core_counts_of_every_digit(dtype: torch.dtype, backend: str) -> None:
    for shape in SHAPES:
        values = values_of(shape, dtype)
        for digit, leading in ((0, 0), (1, 2016), (2, 2016 << 10), (2, (1 << 22) - 1)):
            counts = lk.magnitude_histogram(values, digit=digit, leading=leading, backend=backend)
            assert counts.dtype == torch.int64 and counts.shape == (BINS[digit],)
            assert torch.equal(counts, eager_counts(values, digit, leading)), (shape, digit, leading)


@ON_EACH_BACKEND
def test_core_layouts(backend: str) -> None:
    values = values_of((90, 70), F32)
    known = lk.magnitude_histogram(values, backend=backend)
    gaps = torch.full((180, 141), torch.nan)[::2, 1::2]
    gaps.copy_(values)
    for other in (gaps, values.T, values.T.contiguous().T, -values):
        assert torch.equal(lk.magnitude_histogram(other, backend=backend), known)


@ON_EACH_BACKEND
def test_core_order_of_magnitudes(backend: str) -> None:
    """Zero, a subnormal, one, the largest, infinity, NaN: each above the one before."""
    places = []
    for value in (-0.0, 1e-40, 1.0, 3.4e38, -torch.inf, torch.nan):
        places.append(int(lk.magnitude_histogram(torch.tensor([value]), backend=backend).argmax()))
    assert places == sorted(places) and len(set(places)) >= 5


@pytest.mark.skipif(not _extension.available(), reason="the extension is not built")
def test_same_counts_with_any_number_of_threads() -> None:
    values, threads = values_of((700, 700), F32), torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(lk.magnitude_histogram(values, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], eager_counts(values, 0, 0))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_float64_is_rounded() -> None:
    values = torch.tensor([1.0 - 2**-40, 1.0], dtype=torch.float64)
    assert int(lk.magnitude_histogram(values).max()) == 2


def test_counts_are_constants() -> None:
    assert not lk.magnitude_histogram(torch.randn(5, requires_grad=True)).requires_grad


@pytest.mark.parametrize(("digit", "leading"), [(0, 1), (1, 4096), (2, 1 << 22), (3, 0)])
def test_digits_that_there_are_not(digit: int, leading: int) -> None:
    with pytest.raises(ValueError, match=r"magnitude_histogram: expected (digit|leading) to be an integer from 0"):
        lk.magnitude_histogram(torch.zeros(3), digit=digit, leading=leading)
