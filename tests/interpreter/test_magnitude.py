"""Counts of magnitudes on the Triton kernel, in the interpreter: tests/ops/test_magnitude.py, and the traffic."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from lowrank_kernels.kernels.magnitude import BLOCK, PROGRAMS, part_size
from lowrank_kernels.kernels.target import TARGETS
from tests.ops.test_magnitude import (  # noqa: F401
    BF16,
    F32,
    test_core_counts_of_every_digit,
    test_core_layouts,
    test_core_order_of_magnitudes,
)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_values_are_read_once(dtype: torch.dtype) -> None:
    values = torch.randn(5 * BLOCK + 3).to(dtype)
    with record_memory() as record, without_driver():
        lk.magnitude_histogram(values, backend="triton")
    launch, _ = record.launches  # and a sum of the parts
    traffic = launch.tensors["x_ptr"]
    assert (traffic.read, traffic.written) == (values.numel() * values.element_size(), 0)


@pytest.mark.parametrize("elements", [1, BLOCK, 10**6, 2**31 + 5])
def test_parts_hold_every_element_and_are_no_more_than_there_are_places(elements: int) -> None:
    for target in TARGETS.values():
        size = part_size(target, elements)
        programs = -(-elements // size)
        assert size % BLOCK == 0 and programs <= PROGRAMS * target.num_sms
        assert (programs - 1) * size < elements <= programs * size
