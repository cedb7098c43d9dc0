"""The fuzzer's calls with the Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest

from tests.fuzz.check import faults

CASES, CHUNK = 200, 20


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_results_lie_within_the_formulas_bound(first: int) -> None:
    found = [fault for seed in range(first, first + CHUNK) for fault in faults(seed, ("triton",))]
    assert not found, "\n".join(found)
