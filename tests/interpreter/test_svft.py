"""SVFT on the Triton kernels, in the interpreter: tests/ops/test_svft.py, and the traffic."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from lowrank_kernels.kernels import svft as kernels
from tests.ops.test_svft import (  # noqa: F401
    test_core_a_row_does_not_feel_its_batch,
    test_core_layouts_and_memory_around_them,
    test_core_nan_stays_in_its_token,
    test_core_y_and_gradients_are_as_exact_as_eager,
)
from tests.problems.lora import BF16, F32
from tests.problems.svft import places, svft_tensors


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_three_launches_read_and_write_rows_as_wide_as_m(dtype: torch.dtype) -> None:
    t = svft_tensors((48, 64, 80), places(64, 64, band=1), (64, 64), dtype)
    with record_memory() as record, without_driver():
        lk.svft_linear(**t, backend="triton").sum().backward()
    launches = [launch for launch in record.launches if "svft" in launch.name]
    assert [launch.name for launch in launches] == ["svft_multiply_kernel", "svft_grad_kernel", "svft_multiply_kernel"]
    rows, count = 48 * 64 * dtype.itemsize, len(t["values"])
    forward, grad, back = launches
    assert forward.nbytes == 2 * rows + 4 * (2 * count + 65)
    assert grad.nbytes == 2 * rows + 4 * 3 * count
    assert back.nbytes == 2 * rows + 4 * (3 * count + 65)


def test_more_tokens_than_a_program_takes_are_summed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    index = places(9, 7, 30)
    ds, t = torch.randn(200, 9), torch.randn(200, 7)
    pattern = lk.svft_pattern(index, 9, 7)
    monkeypatch.setattr(kernels, "TOKENS", 64)
    with record_memory() as record, without_driver():
        grad = kernels.svft_grad(ds, t, pattern, 30)
    assert [launch.name for launch in record.launches] == ["svft_grad_kernel", "ordered_sum_kernel"]
    torch.testing.assert_close(grad, (ds.T @ t)[index[0], index[1]])
