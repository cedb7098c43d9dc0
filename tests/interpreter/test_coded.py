"""Products with weights of 4- and 8-bit codes on the Triton kernel, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from lowrank_kernels.kernels.coded import coded_product
from lowrank_kernels.weights import CodedWeight, FP8Weight, NF4Weight, NVFP4Weight
from tests.tolerance import assert_as_exact_as_eager
from tests.weights.stored import STORED, made
from tests.weights.test_coded import DTYPES, FORMATS, by_name, nested, weight_of

SHAPES = ((40, 64), (37, 96), (130, 160))
CASES = [
    pytest.param(kind, shape, dtype, id=f"{kind.__name__}-{shape[0]}x{shape[1]}-{by_name(dtype)}")
    for kind in FORMATS
    for shape in (*SHAPES, (37, 51))
    for dtype in DTYPES
    if shape[1] % 32 == 0 or kind.__name__ != "MXFP4Weight"
]


def check(weight: CodedWeight, rows: int, *, bias: bool = True) -> None:
    """x Wᵀ + bias and dY W, beside eager PyTorch with the dense weight and float64."""
    dtype, (n, k) = weight.dtype, weight.shape
    generator = torch.Generator().manual_seed(3)
    x, grad_y = (torch.randn(rows, width, generator=generator).to(dtype) for width in (k, n))
    added = torch.randn(n, generator=generator) if bias else None
    dense = weight.decode(0, n)
    with without_driver():
        y = coded_product(x, weight.operand(), added)
        grad_x = coded_product(grad_y, weight.operand(), None, grad=True)
    wide = 0.0 if added is None else added.double()
    eager = (x @ dense.T).float() + (0.0 if added is None else added)
    assert_as_exact_as_eager(y, eager.to(dtype), x.double() @ dense.double().T + wide, what="y")
    assert_as_exact_as_eager(grad_x, grad_y @ dense, grad_y.double() @ dense.double(), what="dX")


@pytest.mark.parametrize(("kind", "shape", "dtype"), CASES)
def test_products_are_those_with_the_dense_weight(kind: Any, shape: Any, dtype: torch.dtype) -> None:
    check(kind.from_dense(weight_of(shape, dtype)), 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("name", STORED)
def test_words_and_records(name: str, dtype: torch.dtype) -> None:
    weight = made(name).to(dtype)
    check(weight, 20)
    assert torch.equal(identity_product(weight), weight.decode(0, weight.shape[0]))


@pytest.mark.parametrize("rows", [1, 129])
@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_one_row_and_more_than_a_tile_of_them(kind: Any, rows: int) -> None:
    check(kind.from_dense(weight_of((70, 96), torch.bfloat16)), rows, bias=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("k", [128, 100])
def test_a_double_quantisation(k: int, dtype: torch.dtype) -> None:
    check(nested(NF4Weight.from_dense(weight_of((130, k), dtype), 32)), 20)


@pytest.mark.parametrize("block", [(16, 32), (128, 128), (1, 96), (37, 96), (5, 7)])
def test_blocks_of_fp8_of_every_form(block: tuple[int, int]) -> None:
    check(FP8Weight.from_dense(weight_of((37, 96), torch.bfloat16), block), 20)


def identity_product(weight: CodedWeight) -> Tensor:
    """W as the kernel decodes it: its product with the unit matrix, which adds zeros alone."""
    with without_driver():
        return coded_product(torch.eye(weight.shape[1], dtype=weight.dtype), weight.operand(), None).T


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_it_decodes_to_the_bits_of_the_formula(kind: Any, dtype: torch.dtype) -> None:
    weight = kind.from_dense(weight_of((40, 96), dtype))
    assert torch.equal(identity_product(weight), weight.decode(0, 40))


def test_scales_of_every_float8_over_a_number() -> None:
    scales = torch.arange(1, 127, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(63, 2)
    codes = torch.arange(63 * 16).to(torch.uint8).view(63, 16)
    weight = NVFP4Weight.of_blocks(codes, scales, 700.0, torch.float32)
    assert torch.equal(identity_product(weight), weight.decode(0, 63))


def test_a_nested_scale_is_rounded_twice() -> None:
    weight = nested(NF4Weight.from_dense(weight_of((40, 96), torch.float32), 32))
    assert torch.equal(identity_product(weight), weight.decode(0, 40))


def test_every_float8_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(4, 64)
    weight = FP8Weight.of_blocks(codes, torch.ones(1, 1), (4, 64), torch.float32)
    known, finite = weight.decode(0, 4), ~codes.float().isnan()
    with without_driver():
        for column in range(64):  # one at a time: a NaN would reach every sum of its row
            one = codes[:, column : column + 1].contiguous()
            weight = FP8Weight.of_blocks(one, torch.ones(1, 1), (4, 1), torch.float32)
            y = coded_product(torch.ones(1, 1), weight.operand(), None)[0]
            assert torch.equal(y[finite[:, column]], known[finite[:, column], column])
            assert bool(y[~finite[:, column]].isnan().all())


def test_codes_are_read_and_nothing_of_ws_size_is_made() -> None:
    weight = NF4Weight.from_dense(weight_of((64, 128), torch.bfloat16))
    x = torch.randn(16, 128).bfloat16()
    with record_memory() as record, without_driver():
        coded_product(x, weight.operand(), None)
    (launch,) = record.launches
    assert launch.tensors["codes_ptr"].read == 64 * 128 // 2
    assert launch.tensors["scales_ptr"].read == 4 * 64 * 128 // 64
    assert launch.tensors["out_ptr"].written == 2 * 16 * 64
