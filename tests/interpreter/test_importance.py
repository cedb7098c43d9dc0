"""LoRAPrune's importance on the Triton kernel, in the interpreter: tests/ops/test_importance.py, and the traffic."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from lowrank_kernels.kernels.importance_tiles import importance_tiles
from lowrank_kernels.kernels.target import TARGETS
from tests.ops.test_importance import (  # noqa: F401
    BF16,
    DIMS,
    F32,
    test_core_as_exact_as_eager,
    test_core_layouts,
    test_core_nan_and_infinity_stay_in_their_row,
)
from tests.problems.importance import importance_tensors


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_traffic_is_that_of_reading_w_once(dtype: torch.dtype, dim: str) -> None:
    t = importance_tensors((512, 512, 8), dtype, dtype)
    with record_memory() as record, without_driver():
        lk.lora_importance(**t, dim=dim, backend="triton")
    assert len(record.launches) <= 2
    assert record.launches[0].tensors["w_ptr"].read == t["weight"].nbytes
    assert record.nbytes <= 1.1 * t["weight"].nbytes, record.table()


def test_columns_are_split_until_every_processor_has_two_programs() -> None:
    target = TARGETS["sm_90"]
    for rows, columns, splits in ((4096, 4096, 2), (14336, 4096, 1), (1024, 4096, 8), (64, 14336, 56), (64, 200, 1)):
        assert importance_tiles(target, rows, columns).splits == splits
