"""Weights of few bits: what they stand for, bit for bit, and the ops over them beside the ops over the dense weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.ops.lora import LoRALinear
from lowrank_kernels.ops.planning import plan
from lowrank_kernels.weights import (
    CodedWeight,
    FP4Weight,
    FP8Weight,
    Int4Weight,
    Int8Weight,
    MXFP4Weight,
    NF4Weight,
    NVFP4Weight,
    unpacked,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (NF4Weight, FP4Weight, Int8Weight, FP8Weight, MXFP4Weight)
SHAPES = ((64, 128), (37, 96), (5, 32), (130, 4320))
ODD_SHAPES = ((37, 50), (33, 4304), (3, 7), (1, 1))  # K that is no multiple of a block, or of 16
needs_extension = pytest.mark.skipif(not _extension.available(), reason=f"no extension: {_extension.reason()}")


def by_name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).removeprefix("torch.")


def weight_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) / max(1, shape[1]) ** 0.5).to(dtype)


def cases() -> list[Any]:
    return [
        pytest.param(kind, shape, dtype, id=f"{kind.__name__}-{shape[0]}x{shape[1]}-{by_name(dtype)}")
        for kind in FORMATS
        for shape in SHAPES + ODD_SHAPES
        for dtype in DTYPES
        if kind is not MXFP4Weight or shape[1] % 32 == 0
    ]


def nested(weight: NF4Weight) -> NF4Weight:
    """The same codes under quantised scales, with any map."""
    count = weight.scales.numel()
    scales = (torch.arange(count) * 37 % 256).to(torch.uint8)
    table = torch.linspace(-1, 1, 256)
    tables = table, 0.1 + torch.rand(-(-count // 256), generator=torch.Generator().manual_seed(1))
    given = weight.shape, weight.dtype, weight.codes, scales, weight.values, tables, 0.37, weight.run
    return type(weight)(*given, nested_block=256)


@needs_extension
@pytest.mark.parametrize(("kind", "shape", "dtype"), cases())
def test_the_extension_decodes_to_the_bits_of_the_formula(kind: Any, shape: Any, dtype: torch.dtype) -> None:
    weight = kind.from_dense(weight_of(shape, dtype))
    n = shape[0]
    assert torch.equal(weight.dense(), weight.decode(0, n))
    assert torch.equal(weight.rows(n // 3, n - n // 4), weight.decode(n // 3, n - n // 4))
    for other in DTYPES:
        assert torch.equal(weight.to(other).dense(), weight.to(other).decode(0, n))


@needs_extension
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_a_double_quantisation_is_undone_in_the_order_of_its_roundings(block_size: int, dtype: torch.dtype) -> None:
    weight = nested(NF4Weight.from_dense(weight_of((130, 416), dtype), block_size))
    assert torch.equal(weight.dense(), weight.decode(0, 130))
    table, scales = weight.nested
    first = table[weight.scales[3].item()] * scales[0] + torch.tensor(0.37)
    if block_size == 64:
        code = weight.codes[3 * 32].item() >> 4
        assert weight.dense().reshape(-1)[3 * 64] == (weight.values[code] * first).to(dtype)


@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_a_weight_survives_being_carried_by_an_op(kind: Any) -> None:
    weight = kind.from_dense(weight_of((24, 96), torch.bfloat16))
    again = unpacked(f"{weight.format} {weight.settings()}", weight.parts())
    assert type(again) is kind and again.dtype == torch.bfloat16
    assert torch.equal(again.dense(), weight.dense())


ERRORS = {NF4Weight: 0.1, FP4Weight: 0.13, Int8Weight: 0.01, FP8Weight: 0.03, MXFP4Weight: 0.12}


@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_a_weight_is_near_what_was_encoded(kind: Any) -> None:
    given = weight_of((96, 256), torch.float32)
    error = (kind.from_dense(given).dense() - given).norm() / given.norm()
    assert ERRORS[kind] / 3 < error < ERRORS[kind]


@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_what_a_format_stands_for_is_encoded_without_error(kind: Any) -> None:
    once = kind.from_dense(weight_of((64, 256), torch.float32)).dense()
    twice = kind.from_dense(once)
    close = {"rtol": 1e-3, "atol": 1e-6} if kind is Int8Weight else {"rtol": 3e-7, "atol": 0.0}  # int8: by float16
    torch.testing.assert_close(twice.dense(), once, **close)


def step(weight: Any, rows: int, dtype: torch.dtype, *, dora: bool = False, **options: Any) -> list[Tensor]:
    """y and all gradients of a call over the weight."""
    n, k = weight.shape
    generator = torch.Generator().manual_seed(2)
    x, a, b = (torch.randn(size, generator=generator) for size in ((rows, k), (7, k), (n, 7)))
    operands = [x.to(dtype), a / k**0.5, b]
    bias = torch.randn(n, generator=generator).to(dtype)
    if dora:
        operands.append(torch.rand(n, generator=generator) + 0.5)
    for t in operands:
        t.requires_grad_()
    call = lk.dora_linear if dora else lk.lora_linear
    y = call(operands[0], weight, *operands[1:], bias, scaling=0.4, **options)
    return [y.detach(), *torch.autograd.grad(y, operands, torch.randn(y.shape, generator=generator).to(dtype))]


@needs_extension
@pytest.mark.parametrize("rows", [0, 1, 3, 40, 200])
@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_lora_over_it_is_as_exact_as_over_the_dense_weight(kind: Any, dtype: torch.dtype, rows: int) -> None:
    assert_lora_is_exact(kind.from_dense(weight_of((72, 160), dtype)), rows, dtype)


@needs_extension
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("block_size", [32, 64, 192])
@pytest.mark.parametrize("kind", [NF4Weight, FP4Weight, MXFP4Weight], ids=by_name)
def test_codes_that_few_rows_multiply_where_they_lie_are_as_exact(kind: Any, block_size: int, rows: int) -> None:
    given = weight_of((37, 384), torch.bfloat16) * torch.linspace(0.2, 3.0, 37 * 384).view(37, 384)
    weight = MXFP4Weight.from_dense(given) if kind is MXFP4Weight else kind.from_dense(given, 64)
    if kind is not MXFP4Weight and block_size != 64:  # 192 is no block size of an encoder, and divides K as well
        scales = torch.linspace(0.1, 2.0, 37 * 384 // block_size)
        weight = kind(weight.shape, torch.bfloat16, weight.codes, scales, weight.values, run=block_size)
    assert_lora_is_exact(weight.to(torch.bfloat16), rows, torch.bfloat16)
    x, grad_y = (torch.randn(rows, width).bfloat16() for width in reversed(weight.shape))
    dense = weight.to(torch.bfloat16).dense().double()
    for ours, exact in (
        (weight.to(torch.bfloat16).product(x, None), x.double() @ dense.T),
        (weight.to(torch.bfloat16).grad_product(grad_y), grad_y.double() @ dense),
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-3 * float(exact.abs().max()))


def assert_lora_is_exact(weight: CodedWeight, rows: int, dtype: torch.dtype) -> None:
    """y and all gradients are as near to float64 as those over the dense weight."""
    exact = step(weight.dense().double(), rows, torch.float64, backend="reference")
    dense = step(weight.dense(), rows, dtype, backend="cpu")
    for ours, known, true in zip(step(weight, rows, dtype), dense, exact, strict=True):
        assert ours.dtype == known.dtype and ours.shape == known.shape
        if rows:
            ulp = torch.finfo(dtype).eps * true.abs().max()
            assert (ours.double() - true).abs().max() <= 2 * (known.double() - true).abs().max() + 2 * ulp


@needs_extension
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "dropout_seed": 5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_odd_sizes_and_dropout_give_the_dense_results(kind: Any, dora: bool, options: Any) -> None:
    shape = (37, 96) if kind is MXFP4Weight else (37, 51)
    weight = kind.from_dense(weight_of(shape, torch.float32))
    for rows in (1, 5, 150):
        ours, known = (step(w, rows, torch.float32, dora=dora, **options) for w in (weight, weight.dense()))
        for mine, other in zip(ours, known, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_without_gradients_and_under_autocast(kind: Any) -> None:
    weight = kind.from_dense(weight_of((24, 96), torch.float32))
    x, a, b = torch.randn(3, 96), torch.randn(4, 96), torch.randn(24, 4)
    with torch.no_grad():
        y = lk.lora_linear(x, weight, a, b)
        torch.testing.assert_close(y, lk.lora_linear(x, weight.dense(), a, b), rtol=1e-5, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            half = lk.lora_linear(x, weight, a, b)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("kind", FORMATS, ids=by_name)
def test_many_adapters_over_it(kind: Any) -> None:
    weight = kind.from_dense(weight_of((24, 96), torch.float32))
    stack = lk.LoRAStack.from_factors([(torch.randn(r, 96), torch.randn(24, r), 0.5) for r in (2, 5)])
    x, ids = torch.randn(6, 96), torch.tensor([0, 1, -1, 1, 0, -1])
    known = lk.multi_lora_linear(x, weight.dense(), stack, ids)
    torch.testing.assert_close(lk.multi_lora_linear(x, weight, stack, ids), known, rtol=1e-4, atol=1e-4)


def test_x_decides_the_dtype_that_values_are_rounded_to() -> None:
    weight = NF4Weight.from_dense(weight_of((24, 96), torch.float32))
    x, a, b = torch.randn(3, 96).bfloat16(), torch.randn(4, 96), torch.randn(24, 4)
    known = lk.lora_linear(x, weight.to(torch.bfloat16), a, b)
    assert torch.equal(lk.lora_linear(x, weight, a, b), known)


@needs_extension
def test_no_dense_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = NF4Weight.from_dense(weight_of((72, 160), torch.bfloat16))

    def refuse(*_: Any) -> Any:
        raise AssertionError("the weight was made dense")

    for name in ("dense", "rows", "decode"):
        monkeypatch.setattr(CodedWeight, name, refuse)
    for rows in (1, 40, 200):
        step(weight, rows, torch.bfloat16)
        step(weight, rows, torch.bfloat16, dropout_p=0.1)


@needs_extension
def test_the_allocator_never_holds_a_dense_weight() -> None:
    n = k = 2048  # 8 MiB in bfloat16
    values = NF4Weight.from_dense(weight_of((1, 64), torch.bfloat16)).values
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8)
    weight = NF4Weight(torch.Size((n, k)), torch.bfloat16, codes, torch.full((n * k // 64,), 0.02), values, run=64)
    for dora in (False, True):
        peak = peak_allocated(lambda: step(weight, 4, torch.bfloat16, dora=dora), torch.device("cpu"))  # noqa: B023
        # x, y and their gradients, the factors and theirs; for DoRA's norms, rows of half a million elements in all.
        assert peak < (4 if dora else 1) * 2**20


@needs_extension
def test_the_plan_says_that_codes_are_multiplied() -> None:
    weight = NF4Weight.from_dense(weight_of((24, 96), torch.float32))
    operands = torch.randn(3, 96), weight, torch.randn(4, 96), torch.randn(24, 4)
    made = plan("lora_linear", LoRALinear(*operands, None, None, 1.0, 0.0, None, False, "cpu"))
    assert made.base == "own" and not made.direct
    assert ("base", "own", "rule: nf4 is decoded as it is multiplied") in made.reasons


def test_it_is_compiled_with_the_op_whole() -> None:
    weight = NF4Weight.from_dense(weight_of((24, 96), torch.float32))
    x, a, b = torch.randn(3, 96), torch.randn(4, 96).requires_grad_(), torch.randn(24, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, codes: Tensor, scales: Tensor, values: Tensor, a: Tensor, b: Tensor) -> Tensor:
        made = NF4Weight(torch.Size((24, 96)), torch.float32, codes, scales, values, run=64)
        return lk.lora_linear(x, made, a, b)

    y = compiled(x, weight.codes, weight.scales, weight.values, a, b)
    torch.testing.assert_close(y, lk.lora_linear(x, weight, a, b))
    y.sum().backward()
    assert a.grad is not None


WRONG: dict[str, tuple[Any, str]] = {
    "block size": (lambda: NF4Weight.from_dense(torch.randn(4, 64), 48), "expected block_size to be a power of two"),
    "NaN": (lambda: NF4Weight.from_dense(torch.full((4, 64), torch.nan)), "expected weight to hold finite numbers"),
    "infinity": (lambda: FP8Weight.from_dense(torch.full((4, 64), torch.inf)), "expected weight to hold finite"),
    "too large": (lambda: Int8Weight.from_dense(torch.full((4, 64), 1e6)), "expected weight to hold finite numbers"),
    "K": (lambda: MXFP4Weight.from_dense(torch.randn(4, 33)), "expected K to be a multiple of 32, got .* 33"),
    "shape": (lambda: Int8Weight.from_dense(torch.randn(4)), r"expected weight of shape \(N, K\)"),
    "integers": (lambda: FP4Weight.from_dense(torch.ones(4, 4, dtype=torch.int8)), "and a float dtype"),
    "dtype": (lambda: NF4Weight.from_dense(torch.randn(4, 64), dtype=torch.float64), "expected dtype to be float32"),
    "strides": (
        lambda: Int8Weight.of_rows(torch.zeros(8, 4, dtype=torch.int8).T, torch.ones(4), torch.float32),
        "expected codes to be contiguous",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_encoded_is_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def checkpoint() -> dict[str, Tensor]:
    """What bitsandbytes saves of a weight, double quantisation and all."""
    import json

    weight = nested(NF4Weight.from_dense(weight_of((16, 96), torch.float32)))
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [16, 96],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.37,
    }
    return {
        "w": weight.codes[:, None],
        "w.absmax": weight.scales,
        "w.quant_map": weight.values,
        "w.nested_absmax": weight.nested[1],
        "w.nested_quant_map": weight.nested[0],
        "w.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def test_a_checkpoint_is_read_without_the_package(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = checkpoint()
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    read = NF4Weight.from_checkpoint(tmp_path / "model.safetensors", "w")
    assert torch.equal(read.dense(), NF4Weight.from_tensors(tensors, "w").dense())
    assert read.shape == (16, 96) and read.nested_block == 256


CORRUPT: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop("w.nested_absmax"), "expected the tensor w.nested_absmax, which is not there"),
    "short scales": (lambda t: t.update({"w.absmax": t["w.absmax"][:-1]}), "w: NF4Weight: expected scales of 24 elem"),
    "short codes": (lambda t: t.update({"w": t["w"][:-1]}), "w: NF4Weight: expected codes of 768 elements"),
    "NaN": (lambda t: t["w.nested_absmax"].fill_(torch.nan), "expected w.nested_absmax to hold finite numbers"),
    "dtype": (lambda t: t.update({"w.absmax": t["w.absmax"].float()}), "expected w.absmax of dtype torch.uint8"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_checkpoint_is_refused_by_the_tensors_name(name: str) -> None:
    change, message = CORRUPT[name]
    tensors = checkpoint()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_tensors(tensors, "w")


def test_other_checkpoints() -> None:
    dense = weight_of((20, 64), torch.float32)
    q = Int8Weight.from_dense(dense)
    tensors = {"a.weight": q.codes, "a.SCB": q.scales * 127.0}
    read = Int8Weight.from_tensors(tensors, "a.weight", dtype=torch.float32)
    torch.testing.assert_close(read.dense(), q.dense(), rtol=3e-7, atol=0.0)
    blocks = FP8Weight.from_dense(dense, (16, 32))
    tensors = {"w": blocks.codes, "w_scale_inv": blocks.scales}
    assert torch.equal(
        FP8Weight.from_tensors(tensors, "w", block=(16, 32), dtype=torch.float32).dense(), blocks.dense()
    )
    with pytest.raises(ValueError, match="expected scales of 1 elements for a weight of shape"):
        FP8Weight.from_tensors(tensors, "w", block=(128, 128))
    rows = {"w": blocks.codes, "w_scale": torch.rand(20, 1)}
    known = blocks.codes.float() * rows["w_scale"]
    assert torch.equal(FP8Weight.from_tensors(rows, "w", dtype=torch.float32).dense(), known)
    fours = MXFP4Weight.from_dense(dense)
    tensors = {"w_packed": fours.codes, "w_scale": fours.scales}
    assert torch.equal(MXFP4Weight.from_tensors(tensors, "w", dtype=torch.float32).dense(), fours.dense())


def test_nvfp4_and_int4_checkpoints() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (20, 32), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(20, 4, generator=generator) * 400).to(torch.float8_e4m3fn)
    tensors = {"w_packed": codes, "w_scale": scales, "w_global_scale": torch.tensor([700.0])}
    read = NVFP4Weight.from_tensors(tensors, "w")
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nibbles = torch.stack((codes & 15, codes >> 4), 2).view(20, 64).long()
    values = e2m1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    known = (values * (scales.float() / 700.0).repeat_interleave(16, 1)).bfloat16()
    assert torch.equal(read.dense(), known) and torch.equal(read.decode(0, 20), known)

    words = torch.randint(-(2**31), 2**31 - 1, (20, 8), dtype=torch.int64, generator=generator).int()
    groups = torch.rand(20, 2, generator=generator).bfloat16()
    tensors = {"w_packed": words, "w_scale": groups, "w_shape": torch.tensor([20, 64])}
    read_groups = Int4Weight.from_tensors(tensors, "w")
    q = (words[:, :, None].long() >> (4 * torch.arange(8))) & 15
    known = ((q.view(20, 64) - 8).bfloat16() * groups.repeat_interleave(32, 1)).bfloat16()
    assert torch.equal(read_groups.dense(), known) and torch.equal(read_groups.decode(0, 20), known)
    for dtype in DTYPES:
        for weight in (read.to(dtype), read_groups.to(dtype)):
            x = torch.randn(5, 64, generator=generator).to(dtype)
            torch.testing.assert_close(weight.product(x, None), x @ weight.dense().T, rtol=0.02, atol=0.1)


UNREAD: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "an order": (Int4Weight, {"w_g_idx": torch.zeros(60)}, "expected g_idx of shape"),
    "a width": (Int4Weight, {"w_shape": torch.tensor([4, 60])}, "expected K to be a multiple of 8"),
    "rows": (Int4Weight, {"w_shape": torch.tensor([5, 64])}, "expected w_scale of 5 rows"),
    "words": (
        Int4Weight,
        {"w_packed": torch.zeros(4, 7, dtype=torch.int32)},
        r"expected words of shape \(N, K / 8\) = \(4, 8\)",
    ),
    "no global scale": (NVFP4Weight, {"w_global_scale": torch.zeros(1)}, "expected w_global_scale of one number but 0"),
    "NaN": (NVFP4Weight, {"w_global_scale": torch.tensor([torch.nan])}, "expected w_global_scale to hold finite"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_a_checkpoint_holds_that_is_not_read_is_refused(name: str) -> None:
    kind, changed, message = UNREAD[name]
    int4 = {"w_packed": torch.zeros(4, 8, dtype=torch.int32), "w_shape": torch.tensor([4, 64])}
    nvfp4 = {"w_packed": torch.zeros(4, 32, dtype=torch.uint8), "w_global_scale": torch.ones(1)}
    scale = torch.ones(4, 2) if kind is Int4Weight else torch.ones(4, 4).to(torch.float8_e4m3fn)
    tensors = {**(int4 if kind is Int4Weight else nvfp4), "w_scale": scale, **changed}
    with pytest.raises(ValueError, match=message):
        kind.from_tensors(tensors, "w")


def test_a_scale_that_is_no_number_is_seen_in_what_it_scales() -> None:
    weight = MXFP4Weight.from_dense(weight_of((2, 64), torch.bfloat16))
    weight.scales[0, 1] = 255
    assert weight.dense().isnan().sum() == 32 and bool(weight.dense()[0, 32:].isnan().all())
