"""The bytes that `lrk bench` and the roofline state are those that the kernels move, counted."""

from __future__ import annotations

import pytest
import torch

from lowrank_kernels import tuned
from lowrank_kernels.bench import OPS
from lowrank_kernels.bench.cases.block_sparse import distinct_blocks
from lowrank_kernels.inspect.memory import MemoryRecord, record_memory
from lowrank_kernels.kernels import roofline
from lowrank_kernels.kernels.target import TARGETS

CPU, TARGET = torch.device("cpu"), TARGETS["interpreter"]
SIZES = {"M": 9, "K": 64, "N": 96, "R": 4, "G": 3, "blocks": 3, "size": 32}
DTYPES = [torch.float32, torch.bfloat16]


def counted(op: str, dtype: torch.dtype, **sizes: int) -> tuple[dict[str, int], MemoryRecord]:
    """(shape, what the op's forward by Triton moves)."""
    shape = {name: (SIZES | sizes)[name] for name in OPS[op].shapes[0]}
    inputs = OPS[op].make(shape, dtype, CPU)
    with torch.no_grad(), record_memory() as record:
        OPS[op].providers["ours"](inputs, backend="triton")
    return shape, record


def bytes_of(record: MemoryRecord) -> list[int]:
    return [launch.nbytes for launch in record.launches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["lora_linear", "dora_linear", "block_sparse_weight_grad"])
def test_what_one_launch_moves_is_each_tensor_once(op, dtype):
    shape, record = counted(op, dtype)
    _, launches = OPS[op].launches(TARGET, shape, dtype)
    assert bytes_of(record) == [OPS[op].nbytes(shape, dtype.itemsize)] == [launch.nbytes for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["two_kernel", "library"])
@pytest.mark.parametrize("op", ["lora_linear", "dora_linear"])
def test_the_other_strategies(op, strategy, dtype):
    with tuned.forcing(op) as force:
        force({"strategy": strategy})
        s, record = counted(op, dtype, M=80)
    sizes = (s[k] for k in "MKNR")
    launches = roofline.lora_forward(strategy, *sizes, dtype.itemsize, scaled=op == "dora_linear")
    assert bytes_of(record) == [launch.nbytes for launch in launches]
    assert record.nbytes > OPS[op].nbytes(s, dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_reads_the_weight_once(dtype):
    shape, record = counted("dora_weight_norm", dtype)
    _, launches = OPS["dora_weight_norm"].launches(TARGET, shape, dtype)
    # Beyond the floor it writes ‖W‖², which a caller may keep.
    assert bytes_of(record) == [OPS["dora_weight_norm"].nbytes(shape, dtype.itemsize) + 4 * shape["N"]]
    assert bytes_of(record) == [launch.nbytes for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_reads_and_writes_the_weight(dtype):
    shape, record = counted("merge_lora_", dtype)
    (kernel,) = (launch for launch in record.launches if "merge" in launch.name)  # the rest: the copy, finite factors
    _, (launch,) = OPS["merge_lora_"].launches(TARGET, shape, dtype)
    assert kernel.nbytes == OPS["merge_lora_"].nbytes(shape, dtype.itemsize) == launch.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "launched"), [(64, 1), (1100, 2)])  # columns in one part, and in several
def test_the_importance_reads_the_weight_once(K, launched, dtype):
    shape, record = counted("lora_importance", dtype, K=K)
    _, launches = OPS["lora_importance"].launches(TARGET, shape, dtype)
    assert bytes_of(record) == [launch.nbytes for launch in launches] and len(launches) == launched
    if launched == 1:
        assert bytes_of(record) == [OPS["lora_importance"].nbytes(shape, dtype.itemsize)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_galore_step_reads_g_and_writes_w(dtype):
    shape, record = counted("galore_adam_", dtype, R=16)
    kernels = [launch.nbytes for launch in record.launches if "galore" in launch.name]  # the rest: the copies
    _, launches = OPS["galore_adam_"].launches(TARGET, shape, dtype)
    assert kernels == [launch.nbytes for launch in launches]
    # Beside the formula's: P again, and the step of R rows, written and read.
    again = 4 * shape["R"] * (shape["N"] + 2 * shape["K"])
    assert sum(kernels) == OPS["galore_adam_"].nbytes(shape, dtype.itemsize) + again


@pytest.mark.parametrize("dtype", DTYPES)
def test_svft_moves_rows_as_wide_as_the_smaller_side(dtype):
    shape, record = counted("svft_linear", dtype, E=200)
    _, launches = OPS["svft_linear"].launches(TARGET, shape, dtype)
    made = [launch for launch in record.launches if launch.name in ("linear", "svft_multiply_kernel", "addmm_")]
    assert [launch.nbytes for launch in made] == [launches[i].nbytes for i in (0, 2, 1, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_in_parts(dtype):
    with tuned.forcing("block_sparse_weight_grad") as force:
        force({"splits": 2, "BLOCK_M": 16})
        shape, record = counted("block_sparse_weight_grad", dtype, M=32)
    launches = roofline.block_sparse_weight_grad(32, 3, 32, dtype.itemsize, distinct_blocks(shape), splits=2)
    assert bytes_of(record) == [launch.nbytes for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [64, 1100])  # a reduction in one part, and in two
@pytest.mark.parametrize(("N", "strategy"), [(96, "one kernel"), (97, "library")])
def test_many_adapters(N, strategy, K, dtype):
    K -= K % 8 if strategy == "one kernel" else 0  # whose rows are aligned
    shape, record = counted("multi_lora_linear", dtype, K=K, N=N)
    plan = {"table_ptr", "scalings_ptr", "order_ptr", "tiles_ptr", "ids_ptr"}
    moved = [
        sum(t.read + t.written for name, t in launch.tensors.items() if name not in plan)
        for launch in record.launches
        if launch.name not in {"clamp", "_to_copy", "plan_batch_"}  # the ids in int32, and the plan's making
    ]
    words, launches = OPS["multi_lora_linear"].launches(TARGET, shape, dtype)
    assert words.startswith(strategy)
    assert moved == [launch.nbytes for launch in launches]
    made = sum(launch.nbytes for launch in record.launches if launch.name == "plan_batch_")
    assert made <= 64 * shape["M"]
    assert record.nbytes - made - sum(moved) <= 64 * shape["M"]  # the plan
    assert sum(moved) > OPS["multi_lora_linear"].nbytes(shape, dtype.itemsize)


def test_an_op_in_cpp_is_one_launch():
    shape = {name: SIZES[name] for name in "MKNR"}
    inputs = OPS["lora_linear"].make(shape, torch.float32, CPU)
    with torch.no_grad(), record_memory() as record:
        y = torch.ops.lowrank_kernels.frozen_product(inputs["x"], inputs["weight"], None)
        torch.ops.lowrank_kernels.lora_up_(y, y[:, :4].contiguous(), inputs["lora_b"], True, None, 1.0, None, 0.0)
    first, last = record.launches[0], record.launches[-1]
    assert (first.name, first.nbytes) == ("frozen_product", inputs["x"].nbytes + inputs["weight"].nbytes + y.nbytes)
    assert last.name == "lora_up_" and last.nbytes == 2 * y.nbytes + 9 * 4 * 4 + inputs["lora_b"].nbytes
