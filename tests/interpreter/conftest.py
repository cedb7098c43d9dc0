"""Tests of the Triton kernels in Triton's interpreter, on a CPU. They are a process of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    raise pytest.UsageError(
        "tests/interpreter needs Triton's interpreter, which is chosen when kernels are defined: run it on its own, as "
        "TRITON_INTERPRET=1 python -m pytest tests/interpreter (and the others with --ignore tests/interpreter)"
    )


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN: an element that no kernel writes is found."""
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rows_of_a_dot_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products by NumPy's own loops: a BLAS sums a row in an order that the tile's height decides."""
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: matmul(a, b, dtype=np.longdouble).astype(dtype))
