"""Formats that are read and not written: GPTQ, AWQ, compressed-tensors' INT4, GGUF's records."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels import weights
from lowrank_kernels.weights import (
    AWQWeight,
    CodedWeight,
    FP8Weight,
    GPTQWeight,
    Int4Weight,
    MXFP4Weight,
    NVFP4Weight,
    Q4_KWeight,
    Q8_0Weight,
    unpacked,
)
from tests.weights.stored import GROUP, STORED, made, order, q4_k, q8_0, scales, words
from tests.weights.test_coded import DTYPES, assert_lora_is_exact, by_name, needs_extension, step


def nibble(word: int, place: int) -> int:
    return word >> 4 * place & 15


def element(weight: CodedWeight, qzeros: Tensor, version: str, n: int, k: int) -> float:
    """One element of a weight in words, by integers of Python, from the file's tensors."""
    group = k // GROUP if weight.groups is None else int(weight.groups[k])
    row = [0, 4, 1, 5, 2, 6, 3, 7][n % 8] if isinstance(weight, AWQWeight) else n % 8
    zero_word = int(qzeros[group, n // 8]) + (0x11111111 if version == "gptq" else 0)
    if isinstance(weight, AWQWeight):
        q = nibble(int(weight.codes[k, n // 8]), row)
    else:
        q = nibble(int(weight.codes[k // 8, n]), k % 8)
    exact = (q - nibble(zero_word % 2**32, row)) * float(weight.scales[group, n])
    return float(torch.tensor(exact, dtype=torch.float64).half())


@pytest.mark.parametrize("name", ["gptq", "gptq v2", "gptq in an order", "awq"])
def test_words_stand_for_what_the_format_says(name: str) -> None:
    weight = made(name)
    n, k = weight.shape
    qzeros = words(k // GROUP, n // 8, seed=3)
    version = "awq" if name == "awq" else "gptq_v2" if "v2" in name else "gptq"
    known = [[element(weight, qzeros, version, i, j) for j in range(k)] for i in range(n)]
    assert torch.equal(weight.dense().double(), torch.tensor(known, dtype=torch.float64))


@pytest.mark.parametrize("name", ["int4 with zero points", "int4 in an order", "int4 with both"])
def test_int4_stands_for_what_the_format_says(name: str) -> None:
    weight = made(name)
    n, k = weight.shape
    q = torch.tensor([[nibble(int(word), i) for word in row for i in range(8)] for row in words(n, k // 8)])
    groups = order(k).long() if "order" in name or "both" in name else torch.arange(k) // GROUP
    zeros = torch.full((n, k // GROUP), 8)
    if "zero" in name or "both" in name:
        stored = words(-(-n // 8), k // GROUP, seed=3)
        zeros = torch.stack([torch.tensor([nibble(int(w), i % 8) for w in stored[i // 8]]) for i in range(n)])
    known = (q - zeros[:, groups]).double() * scales(n, k // GROUP, dtype=torch.bfloat16)[:, groups].double()
    assert torch.equal(weight.dense(), known.bfloat16())


@pytest.mark.parametrize(("make", "name"), [(q8_0, "Q8_0"), (q4_k, "Q4_K")])
def test_records_have_the_bits_of_the_package_gguf(make: Any, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight = make(19, 768)
    known = gguf.quants.dequantize(weight.codes.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(weight.to(torch.float32).dense(), torch.from_numpy(known))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("name", STORED)
def test_the_extension_decodes_to_the_bits_of_the_formula(name: str, dtype: torch.dtype) -> None:
    weight = made(name).to(dtype)
    n = weight.shape[0]
    assert torch.equal(weight.dense(), weight.decode(0, n))
    for start in range(9):
        assert torch.equal(weight.rows(start, n - start), weight.decode(start, n - start))


@pytest.mark.parametrize("name", STORED)
def test_a_weight_survives_being_carried_by_an_op_and_by_a_layer(name: str, tmp_path: Path) -> None:
    weight = made(name)
    again = unpacked(f"{weight.format} {weight.settings()}", weight.parts())
    assert type(again) is type(weight) and torch.equal(again.dense(), weight.dense())
    layer, other = (lk.nn.CodedLinear(w) for w in (weight, made(name)))
    for buffer in other.buffers():
        buffer.zero_()
    other.weight.zero_()
    torch.save(layer.state_dict(), tmp_path / "layer")
    other.load_state_dict(torch.load(tmp_path / "layer"))
    assert torch.equal(other.bfloat16().stored_weight().dense(), weight.dense())


@needs_extension
@pytest.mark.parametrize("rows", [0, 1, 5, 40, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("name", STORED)
def test_lora_over_it_is_as_exact_as_over_the_dense_weight(name: str, dtype: torch.dtype, rows: int) -> None:
    assert_lora_is_exact(made(name).to(dtype), rows, dtype)


@pytest.mark.parametrize("name", STORED)
def test_dora_many_adapters_and_the_plain_product_over_it(name: str) -> None:
    weight = made(name).to(torch.float32)
    n, k = weight.shape
    close = {"rtol": 2e-4, "atol": 2e-4}
    for mine, known in zip(
        *(step(w, 6, torch.float32, dora=True) for w in (weight, weight.dense())),
        strict=True,
    ):
        torch.testing.assert_close(mine, known, **close)
    x = torch.randn(6, k, requires_grad=True)
    ours, known = (lk.frozen_linear(x, w) for w in (weight, weight.dense()))
    torch.testing.assert_close(ours, known, **close)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x) for y in (ours, known)), **close)
    stack = lk.LoRAStack.from_factors([(torch.randn(r, k), torch.randn(n, r), 0.5) for r in (2, 5)])
    ids = torch.tensor([0, 1, -1, 1, 0, -1])
    outs = (lk.multi_lora_linear(x.detach(), w, stack, ids) for w in (weight, weight.dense()))
    torch.testing.assert_close(*outs, rtol=2e-3, atol=2e-3)


def gptq_tensors(**changed: Any) -> dict[str, Tensor]:
    parts = {"qweight": words(12, 40), "qzeros": words(3, 5, seed=3), "scales": scales(3, 40), "g_idx": order(96)}
    return {f"q.{name}": t for name, t in {**parts, **changed}.items() if t is not None}


WRONG: dict[str, tuple[Any, str]] = {
    "no format": (
        lambda: GPTQWeight.from_tensors(gptq_tensors(), "q", checkpoint_format="marlin"),
        "q: GPTQWeight: expected checkpoint_format 'gptq' or 'gptq_v2', got 'marlin'",
    ),
    "missing": (
        lambda: GPTQWeight.from_tensors(gptq_tensors(qzeros=None), "q", checkpoint_format="gptq"),
        "expected the tensor q.qzeros, which is not there",
    ),
    "group out of range": (
        lambda: GPTQWeight.from_tensors(gptq_tensors(g_idx=order(96) + 1), "q", checkpoint_format="gptq"),
        "expected g_idx from 0 to 2, got 1 to 3",
    ),
    "g_idx": (
        lambda: GPTQWeight.from_tensors(gptq_tensors(g_idx=order(64)), "q", checkpoint_format="gptq"),
        r"expected g_idx of shape \(K,\) = \(96,\), got \(64,\)",
    ),
    "scales": (
        lambda: GPTQWeight.from_tensors(gptq_tensors(scales=scales(3, 32)), "q", checkpoint_format="gptq"),
        r"expected scales of shape \(G, N\), of a float dtype, with N = 40",
    ),
    "NaN": (
        lambda: GPTQWeight.from_tensors(
            gptq_tensors(scales=torch.full((3, 40), torch.nan)), "q", checkpoint_format="gptq"
        ),
        "q: GPTQWeight: expected scales to hold finite numbers",
    ),
    "zero points": (
        lambda: AWQWeight.of_words(words(96, 5), words(3, 4), scales(3, 40)),
        r"AWQWeight: expected int32 qzeros of shape \(G, N / 8\) = \(3, 5\), got \(3, 4\)",
    ),
    "AWQ of words down": (
        lambda: AWQWeight.of_words(words(12, 40), words(3, 5), scales(3, 40)),
        r"AWQWeight: expected scales of shape \(G, N\)",
    ),
    "zero points of int4": (
        lambda: Int4Weight.of_groups(words(20, 8), scales(20, 2), 64, torch.float16, words(20, 2)),
        r"Int4Weight: expected zero points in words of shape \(N / 8, K / g\) = \(3, 2\), got \(20, 2\)",
    ),
    "bytes": (
        lambda: Q8_0Weight.of_records(torch.zeros(4, 34, dtype=torch.uint8), 64),
        "Q8_0Weight: expected codes of 272 elements",
    ),
    "K": (
        lambda: Q4_KWeight.of_records(torch.zeros(4, 144, dtype=torch.uint8), 288),
        "Q4_KWeight: expected K to be a multiple of 256",
    ),
    "a NaN scale": (
        lambda: Q8_0Weight.of_records(torch.full((4, 34), 0xFF, dtype=torch.uint8), 32),
        "Q8_0Weight: expected scales to be finite numbers",
    ),
    "no bytes": (
        lambda: Q8_0Weight.of_records(torch.zeros(4, 34), 32),
        "Q8_0Weight: expected records as uint8",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


class QuantLinear(nn.Module):
    """The attributes of a linear of GPTQModel or AutoGPTQ that say what it holds."""

    def __init__(self, zero_format: int | None, bits: int = 4) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, 96, 40
        self.bias = None
        for name, part in gptq_tensors().items():
            self.register_buffer(name.removeprefix("q."), part)
        if zero_format is not None:
            self.qzero_format = lambda: zero_format

    def forward(self, x: Tensor) -> Tensor:
        return x @ GPTQWeight.from_module(self).to(x.dtype).dense().T


@pytest.mark.parametrize(("zero_format", "version"), [(None, "gptq"), (1, "gptq"), (2, "gptq_v2")])
def test_a_live_gptq_linear_is_read_and_adapted(zero_format: int | None, version: str) -> None:
    linear = QuantLinear(zero_format)
    found = weights.of(linear)
    known = GPTQWeight.from_tensors(gptq_tensors(), "q", checkpoint_format=version)
    assert isinstance(found, GPTQWeight) and torch.equal(found.dense(), known.dense())
    assert found.codes.data_ptr() == linear.qweight.data_ptr()
    model = nn.Sequential(linear)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(3, 96)
    y = model(x)
    report = lk.adapt(model, lk.LoRAConfig(r=4, target_modules=["0"]))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    report.undo()
    assert model[0] is linear and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_other_layouts_of_live_linears_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 4 bits, got a linear of 8"):
        weights.of(QuantLinear(1, bits=8))
    moved = QuantLinear(1)
    moved.in_features = 48
    with pytest.raises(ValueError, match="a kernel of its own has laid it out anew"):
        weights.of(moved)


def test_a_live_awq_linear_is_read() -> None:
    linear = nn.Module()
    linear.w_bit, linear.in_features, linear.out_features = 4, 96, 40
    parts = {"qweight": words(96, 5), "qzeros": words(3, 5, seed=3), "scales": scales(3, 40)}
    for name, part in parts.items():
        linear.register_buffer(name, part)
    found = weights.of(linear)
    assert isinstance(found, AWQWeight) and torch.equal(found.dense(), AWQWeight.of_words(*parts.values()).dense())
    linear.in_features = 40
    with pytest.raises(ValueError, match="only the layout of AutoAWQ's GEMM kernels is read"):
        weights.of(linear)


def test_a_live_linear_of_compressed_tensors_is_read() -> None:
    def check(known: CodedWeight, parts: dict[str, Tensor], **scheme: Any) -> None:
        linear = nn.Linear(64, 21, bias=False)
        del linear._parameters["weight"]
        settings = {"num_bits": 4, "group_size": None, "block_structure": None, **scheme}
        linear.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(**settings))
        for name, part in parts.items():
            linear.register_parameter(name, nn.Parameter(part, requires_grad=False))
        found = weights.of(linear)
        assert type(found) is type(known) and torch.equal(found.dense(), known.dense())

    shape = {"weight_shape": torch.tensor([21, 64])}
    parts = {"weight_packed": words(21, 8), "weight_scale": scales(21, 2), "weight_zero_point": words(3, 2), **shape}
    check(Int4Weight.from_tensors(parts, "weight"), parts)
    codes = words(21, 8).view(torch.uint8)
    parts = {"weight_packed": codes, "weight_scale": torch.randint(120, 130, (21, 2)).to(torch.uint8)}
    check(MXFP4Weight.from_tensors(parts, "weight"), parts, group_size=32)
    parts = {"weight_packed": codes, "weight_scale": scales(21, 4).to(torch.float8_e4m3fn)}
    parts["weight_global_scale"] = torch.tensor([700.0])
    check(NVFP4Weight.from_tensors(parts, "weight"), parts, group_size=16)
    eights = {"weight": torch.randn(21, 64).to(torch.float8_e4m3fn)}
    for grid, block in (((21, 1), None), ((1,), None), ((2, 4), [16, 16])):
        by_rows = (1, 64) if len(grid) == 2 else (21, 64)
        scale = scales(*grid).bfloat16()
        known = FP8Weight.of_blocks(eights["weight"], scale, tuple(block or by_rows), torch.bfloat16)
        check(known, {**eights, "weight_scale": scale}, num_bits=8, block_structure=block)


def test_experts_are_weights_that_share_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 20, 2, 16), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(110, 140, (3, 20, 2), dtype=torch.uint8, generator=generator)
    found = MXFP4Weight.experts({"up_blocks": blocks, "up_scales": exponents}, "up")
    assert [w.codes.data_ptr() for w in found] == [b.data_ptr() for b in blocks]
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    codes = torch.stack((blocks & 15, blocks >> 4), -1).view(3, 20, 64).long()
    known = values[codes] * 2.0 ** (exponents.float() - 127).repeat_interleave(32, 2)
    assert all(torch.equal(w.dense(), k.bfloat16()) for w, k in zip(found, known, strict=True))
    with pytest.raises(ValueError, match=r"expected up_blocks \(E, N, K / 32, 16\) and _scales \(E, N, K / 32\)"):
        MXFP4Weight.experts({"up_blocks": blocks[0], "up_scales": exponents}, "up")


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weight = q8_0(6, 64)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", weight.codes.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = Q8_0Weight.from_checkpoint(tmp_path / "m.gguf", "w")
    assert read.shape == (6, 64) and torch.equal(read.dense(), weight.dense())
    with pytest.raises(ValueError, match="expected the tensor v, which is not there"):
        Q8_0Weight.from_checkpoint(tmp_path / "m.gguf", "v")
    with pytest.raises(ValueError, match="expected w of type Q4_K, got Q8_0"):
        Q4_KWeight.from_checkpoint(tmp_path / "m.gguf", "w")
