"""GaLore's step on the Triton kernels, in the interpreter: tests/ops/test_galore.py, and the traffic."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from tests.ops.test_galore import (  # noqa: F401
    test_core_a_step_writes_its_own_elements_alone,
    test_core_nan_and_infinity_stay_in_their_column,
    test_core_weight_and_moments_are_as_exact_as_eager,
    test_the_write_is_noticed,
    test_without_decay_and_with_a_first_step,
)
from tests.problems.galore import SETTINGS, galore_tensors
from tests.problems.lora import BF16, F32


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_launches_read_g_once_and_w_once(dtype: torch.dtype) -> None:
    t = galore_tensors((192, 160, 16), dtype)
    with record_memory() as record, without_driver():
        lk.galore_adam_(**t, **SETTINGS, backend="triton")
    project, write = record.launches
    assert project.tensors["g_ptr"].read == t["grad"].nbytes and project.tensors["g_ptr"].written == 0
    w = write.tensors["w_ptr"]
    assert w.read == w.written == t["weight"].nbytes
    thin = 4 * (2 * t["basis"].numel() + 6 * t["exp_avg"].numel())
    assert record.nbytes == 3 * t["weight"].nbytes + thin, record.table()
