"""Products with weights of 4- and 8-bit codes on the Triton kernel, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.triton_internals import without_driver
from lowrank_kernels.kernels.coded import coded_product
from lowrank_kernels.weights import CodedWeight, FP8Weight, NF4Weight, NVFP4Weight
from tests.tolerance import assert_as_exact_as_eager
from tests.weights.stored import STORED, made
from tests.weights.test_coded import DTYPES, FORMATS, by_name, nested, weight_of
from tests.weights.test_toy_format import TransposedWeight

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


OVER = {
    "nf4": lambda dtype: NF4Weight.from_dense(weight_of((72, 160), dtype)),
    "nf4 across rows": lambda dtype: NF4Weight.from_dense(weight_of((37, 51), dtype)),
    "fp8": lambda dtype: FP8Weight.from_dense(weight_of((72, 160), dtype), (16, 32)),
    "gptq in an order": lambda dtype: made("gptq in an order").to(dtype),
    "q4_k": lambda dtype: made("q4_k").to(dtype),
}


def results(weight: Any, rows: int, rank: int, dtype: torch.dtype, backend: str, dora: bool, p: float) -> list[Tensor]:
    """y and every gradient of the op, of the same operands in any dtype."""
    n, k = weight.shape
    generator = torch.Generator().manual_seed(5)
    sizes = {"x": (rows, k), "lora_a": (rank, k), "lora_b": (n, rank), "bias": (n,), "gate": (rank,), "magnitude": (n,)}
    made = {name: torch.randn(size, generator=generator).bfloat16().to(dtype) for name, size in sizes.items()}
    made["magnitude"] = made["magnitude"].abs() + 0.5
    del made["gate" if dora else "magnitude"]
    grad_y = torch.randn(rows, n, generator=generator).bfloat16().to(dtype)
    for t in made.values():
        t.requires_grad_()
    call = lk.dora_linear if dora else lk.lora_linear
    options = {"dropout_p": p, "dropout_seed": 5} if p else {}
    with without_driver():
        y = call(weight=weight, scaling=0.3, backend=backend, **options, **made)
        return [y.detach(), *torch.autograd.grad(y, list(made.values()), grad_y)]


CALLS = [
    ("nf4", (1, 1), torch.bfloat16, False, 0.0),
    ("nf4", (129, 16), torch.bfloat16, True, 0.0),
    ("nf4", (70, 72), torch.bfloat16, False, 0.3),
    ("nf4", (20, 7), torch.float32, True, 0.3),
    ("nf4", (129, 16), torch.float16, False, 0.0),
    ("nf4 across rows", (20, 7), torch.bfloat16, False, 0.3),
    ("nf4 across rows", (70, 16), torch.float32, True, 0.0),
    ("fp8", (70, 16), torch.bfloat16, True, 0.3),
    ("fp8", (5, 72), torch.bfloat16, False, 0.0),
    ("gptq in an order", (20, 7), torch.bfloat16, True, 0.0),
    ("q4_k", (20, 16), torch.float16, False, 0.3),
]


@pytest.mark.parametrize(("name", "sizes", "dtype", "dora", "dropout_p"), CALLS)
def test_the_ops_over_codes(name: str, sizes: Any, dtype: torch.dtype, dora: bool, dropout_p: float) -> None:
    weight = OVER[name](dtype)
    dense = weight.decode(0, weight.shape[0])
    ours = results(weight, *sizes, dtype, "triton", dora, dropout_p)
    eager = results(dense, *sizes, dtype, "reference", dora, dropout_p)
    exact = results(dense.double(), *sizes, torch.float64, "reference", dora, dropout_p)
    for mine, known, oracle in zip(ours, eager, exact, strict=True):
        # The reference of 16 bits works in float32 throughout, ours rounds P and Q.
        unit = torch.finfo(dtype).eps * oracle.abs().max()
        assert (mine - oracle).abs().max() <= 3 * (known - oracle).abs().max() + 4 * unit


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_weights_without_a_kernel_multiply_by_themselves(backend: str) -> None:
    weight = TransposedWeight(weight_of((64, 40), torch.float32))
    for dora in (False, True):
        ours = results(weight, 9, 4, torch.float32, backend, dora, 0.0)
        known = results(weight.dense(), 9, 4, torch.float32, "reference", dora, 0.0)
        for mine, other in zip(ours, known, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_step_moves_little_more_than_it_must() -> None:
    """5 launches and 1.35 times the floor: x, W, y once in forward; dY, W, x, dX once in backward."""
    M, K, N, R = 1024, 512, 512, 16
    weight = NF4Weight.from_dense(weight_of((N, K), torch.bfloat16))
    x, grad_y = (torch.randn(M, width).bfloat16() for width in (K, N))
    a, b = torch.randn(R, K).bfloat16().requires_grad_(), torch.randn(N, R).bfloat16().requires_grad_()
    x.requires_grad_()
    with record_memory() as record, without_driver():
        lk.lora_linear(x, weight, a, b, backend="triton").backward(grad_y)
    floor = 2 * (M * K + M * N) + 2 * (M * N + 2 * M * K) + 2 * 0.53 * N * K
    known, b, a = weight.decode(0, N), b.detach(), a.detach()
    with record_memory() as peers, torch.no_grad():  # W written out dense, forward and backward
        p = x @ a.T
        torch.mm(x, known.clone().T).addmm_(p, b.T)
        q = grad_y @ b
        torch.mm(grad_y, known.clone()).addmm_(q, a)
        q.T @ x
        grad_y.T @ p
    print(
        f"{len(record.launches)} launches, {record.nbytes / floor:.3f} of the floor; dense, {peers.nbytes / floor:.3f}"
    )
    assert record.nbytes <= 1.35 * floor
    assert peers.nbytes > 2 * floor


def test_codes_are_read_and_nothing_of_ws_size_is_made() -> None:
    weight = NF4Weight.from_dense(weight_of((64, 128), torch.bfloat16))
    x = torch.randn(16, 128).bfloat16()
    with record_memory() as record, without_driver():
        coded_product(x, weight.operand(), None)
    (launch,) = record.launches
    assert launch.tensors["codes_ptr"].read == 64 * 128 // 2
    assert launch.tensors["scales_ptr"].read == 4 * 64 * 128 // 64
    assert launch.tensors["out_ptr"].written == 2 * 16 * 64
