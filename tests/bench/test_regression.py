"""`make bench`: what is printed as moved, and what fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import lowrank_kernels
from lowrank_kernels.bench import Row

pytest.importorskip("pytest_benchmark")
KEY = ("lora_linear", "M=1", "float32", "inference")


@pytest.fixture(scope="module")
def bench_ops():
    path = Path(lowrank_kernels.__file__).parent.parent / "benchmarks" / "bench_ops.py"
    spec = importlib.util.spec_from_file_location("bench_ops", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("then", "ratio", "told", "fails"),
    [
        (1.0, 1.04, False, False),  # within the spread of both
        (1.0, 1.2, True, False),
        (1.0, 0.7, True, False),
        (1.0, 1.57, True, False),  # less its own spread and the committed one, not beyond the factor
        (1.0, 1.7, True, True),
        (None, 9.0, True, False),  # no such row was committed
    ],
)
def test_a_row_is_told_beyond_its_spread_and_fails_beyond_the_factor(bench_ops, then, ratio, told, fails):
    committed = None if then is None else Row(*KEY, "ours", 1.0, 0.05, then)
    for same_device in (True, False):
        moved = []
        if fails and same_device:
            with pytest.raises(
                pytest.fail.Exception, match=r"lora_linear M=1 float32 inference: 1.70 .*was 1.00 \(\+70%\)"
            ):
                bench_ops.judge(moved, KEY, committed, ratio, 0.01, same_device)
        else:
            bench_ops.judge(moved, KEY, committed, ratio, 0.01, same_device)
        assert bool(moved) is told


def test_every_committed_row_of_ours_is_measured_again(bench_ops):
    cases = {
        (op, " ".join(f"{k}={v}" for k, v in shape.items()), str(dtype).removeprefix("torch."), training)
        for op, shape, dtype, training in (case.values for case in bench_ops.CASES)
    }
    assert {(*key[:3], key[3] == "training") for key in bench_ops.COMMITTED} == cases
