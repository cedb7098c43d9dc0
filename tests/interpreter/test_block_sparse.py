"""Launches and bytes of the block-sparse kernels, and AdamW, in the interpreter."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.functional import block_adamw_, read_blocks
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.kernels.block_sparse import block_grad, write_blocks_
from lowrank_kernels.kernels.block_sparse_tiles import BlockGradTiles, block_grad_tiles
from lowrank_kernels.kernels.target import TARGETS
from lowrank_kernels.reference import block_sparse_weight_grad_ref
from lowrank_kernels.reference.block_sparse import write_blocks_ref_
from tests.interpreter.test_lora import _far_apart, _in_place
from tests.ops.test_block_sparse import check_adamw
from tests.problems.block_sparse import random_index
from tests.problems.lora import BF16, F16, F32
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_launches_and_bytes(dtype: torch.dtype) -> None:
    """One launch, or two with split tokens; what is read are the rows and columns in need, and nothing else."""
    M, K, N = 512, 256, 192
    x, grad_y = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    index = torch.tensor([(0, 0), (0, 2), (1, 2), (5, 2)], dtype=torch.int32)
    with record_memory() as record:
        lk.block_sparse_weight_grad(x, grad_y, index, 32, backend="triton")
    assert [launch.name for launch in record.launches] == ["block_grad_kernel", "ordered_sum_kernel"], record.table()
    first = record.launches[0].tensors
    assert first["x_ptr"].read == M * 2 * 32 * dtype.itemsize
    assert first["dy_ptr"].read == M * 3 * 32 * dtype.itemsize
    odd = torch.tensor([(0, 0), (1, 2)], dtype=torch.int32)
    with record_memory() as record:  # tiles of 64 over blocks of 48: no byte of the neighbours
        lk.block_sparse_weight_grad(x, grad_y, odd, 48, backend="triton")
    assert record.launches[0].tensors["x_ptr"].read == M * 2 * 48 * dtype.itemsize, record.table()
    many = torch.tensor([(i, j) for i in range(6) for j in range(8)], dtype=torch.int32)
    with record_memory() as record:
        lk.block_sparse_weight_grad(x, grad_y, many, 32, backend="triton")
    assert [launch.name for launch in record.launches] == ["block_grad_kernel"], record.table()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", [(16, 16), (32, 64)])
def test_any_tiles(dtype: torch.dtype, splits: int, tile: tuple[int, int]) -> None:
    """Tiles smaller and larger than a block, ragged blocks, and splits of which the last is short."""
    x, grad_y = torch.randn(90, 100).to(dtype), torch.randn(90, 70).to(dtype)
    size, index = (32, 48), random_index(70, 100, (32, 48), 0.7)
    tiles = BlockGradTiles(16, *tile, splits, num_warps=4, num_stages=2)
    ours = block_grad(x, grad_y, index, size, dtype, tiles)
    exact = block_sparse_weight_grad_ref(x.double(), grad_y.double(), index, size)
    eager = read_blocks(grad_y.T @ x, index, size)
    assert_as_exact_as_eager(ours, eager, exact, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("block_dtype", [BF16, F32])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_are_written_where_they_belong(dtype: torch.dtype, block_dtype: torch.dtype, transposed: bool) -> None:
    """Ragged ones too, and nothing beside them: one launch, each element once."""
    size, index = (32, 48), random_index(70, 100, (32, 48), 0.7)
    weight = torch.randn(100, 70).to(dtype).T if transposed else torch.randn(70, 100).to(dtype)
    blocks = torch.randn(len(index), *size).to(block_dtype)
    expected = write_blocks_ref_(weight.clone(), blocks, index)
    with record_memory() as record:
        write_blocks_(weight, blocks, index)
    assert torch.equal(weight, expected)
    assert [launch.name for launch in record.launches] == ["write_blocks_kernel"], record.table()


def test_tiles_split_tokens_only_for_want_of_blocks() -> None:
    target = TARGETS["sm_90"]
    assert block_grad_tiles(target, 8192, 4096, 64, 64, BF16).splits == 1
    assert block_grad_tiles(target, 8192, 41, 64, 64, BF16).splits == 2 * 132 // 41
    assert block_grad_tiles(target, 300, 1, 64, 64, BF16).splits == 2


def test_offsets_beyond_two_to_the_31() -> None:
    """The last row of x starts past element 2**31, in address space that costs no memory."""
    M, K = 17, 16
    x = _far_apart(M, K, BF16)
    x.copy_(torch.randn(M, K))
    grad_y = torch.randn(M, 16).to(BF16)
    index = torch.zeros(1, 2, dtype=torch.int32)
    tiles = block_grad_tiles(TARGETS["interpreter"], M, 1, 16, 16, BF16)
    ours = _in_place(lambda: block_grad(x, grad_y, index, (16, 16), BF16, tiles))
    near = block_grad(x.contiguous(), grad_y, index, (16, 16), BF16, tiles)
    assert torch.equal(ours, near)


def test_adamw() -> None:
    with record_memory():
        check_adamw("triton")


def test_adamw_in_one_launch_with_the_reference_bits_of_stochastic_rounding() -> None:
    index = random_index(60, 40, (16, 16), 0.5)
    found = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        weight = torch.randn(60, 40).to(BF16)
        blocks = read_blocks(weight, index, (16, 16))
        moments = [torch.zeros_like(blocks, dtype=F32) for _ in range(2)]
        grad = read_blocks(torch.randn(60, 40).to(BF16), index, (16, 16))
        with record_memory() as record:
            block_adamw_(
                blocks,
                grad,
                *moments,
                weight,
                index,
                step=1,
                lr=1e-3,
                seed=torch.tensor(-7),
                backend=backend,
            )
        found[backend] = weight
    assert [launch.name for launch in record.launches] == ["block_adamw_kernel"]
    # Where the unrounded value differs in its last bit, a carry can fall either way.
    assert (found["reference"] != found["triton"]).float().mean() < 1e-3
