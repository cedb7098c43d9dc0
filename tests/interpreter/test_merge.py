"""Merging on the Triton kernel, in the interpreter: the tests of tests/ops/test_merge.py, and the traffic."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from tests.ops.test_merge import (  # noqa: F401
    operands,
    test_core_as_exact_as_eager,
    test_core_special_values,
    test_core_stochastic_rounding_draws_the_published_bits,
    test_strides_and_empty,
    test_the_write_is_noticed,
)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_one_launch_that_reads_and_writes_w_once(rounding: str) -> None:
    """Nothing of W's size is allocated, and every byte of W moves once each way."""
    w, a, b = operands(130, 200, 7, torch.bfloat16)
    with record_memory() as record, without_driver():
        lk.merge_lora_(w, a, b, rounding=rounding, seed=1, check_finite=False, backend="triton")
    (launch,) = (each for each in record.launches if each.name == "merge_lora_kernel")
    traffic = launch.tensors["w_ptr"]
    assert traffic.read == traffic.written == 2 * w.numel()
    beside = [each for each in record.launches if each is not launch]
    assert sum(each.nbytes for each in beside) <= 64, record.table()  # the seed
