"""Models over weights of few bits: casts, copies, names, hooks, and methods that need a dense weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.nn import CodedLinear, LoRALinear
from lowrank_kernels.weights import FP8Weight, GPTQWeight, Int4Weight, MXFP4Weight, NF4Weight, NVFP4Weight

FORMATS = ("nf4", "int8", "fp8", "mxfp4")


def quantised(format_: str = "nf4", **config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    skip = ["1"] if format_ == "mxfp4" else []  # K = 48 is no multiple of 32
    lk.quantize_(model, format_, skip=skip)
    if config:
        lk.adapt(model, lk.LoRAConfig(target_modules=["0", "1"], **config))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_cast_leaves_codes_and_scales(format_: str, dtype: torch.dtype) -> None:
    model = quantised(format_, r=4)
    layer = model[0].base_layer
    before = [part.clone() for part in layer.stored_weight().parts()]
    for cast in (dtype, torch.float32, dtype):
        model.to(cast)
        after = layer.stored_weight().parts()
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    x = torch.randn(3, 64).to(dtype)
    known = x.float() @ layer.stored_weight().to(dtype).dense().float().T + layer.bias.float()
    torch.testing.assert_close(model[0](x).float(), known, rtol=0.02, atol=0.02)


def test_a_weight_is_what_its_tensors_hold_now() -> None:
    layer, other = (CodedLinear(NF4Weight.from_dense(torch.randn(8, 64))) for _ in range(2))
    x = torch.randn(2, 64)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.weight.data = torch.zeros_like(layer.weight)
    assert torch.equal(layer.stored_weight().codes, torch.zeros_like(layer.weight))
    twin = copy.deepcopy(other)
    twin.weight.zero_()
    assert not torch.equal(twin(x), other(x)) and other.weight.any()


@pytest.mark.parametrize("format_", FORMATS)
def test_dora_trains_through_its_norm(format_: str) -> None:
    kind = {"nf4": NF4Weight, "int8": lk.weights.Int8Weight, "fp8": FP8Weight, "mxfp4": MXFP4Weight}[format_]
    weight = kind.from_dense(torch.randn(33, 64))
    grads = []
    for over in (weight, weight.dense()):
        torch.manual_seed(1)
        operands = [torch.randn(size, requires_grad=True) for size in ((5, 64), (3, 64), (33, 3), (33,))]
        y = lk.dora_linear(operands[0], over, *operands[1:], detach_norm=False)
        grads.append(torch.autograd.grad(y.square().sum(), operands))
    for ours, known in zip(*grads, strict=True):
        torch.testing.assert_close(ours, known, rtol=1e-3, atol=1e-3 * float(known.abs().max()))


def test_a_module_of_two_names_keeps_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(64, 64)
            self.y = self.x

    model = Twice()
    lk.quantize_(model)
    assert model.x is model.y and isinstance(model.x, CodedLinear)
    lk.dequantize_(model)
    assert model.x is model.y and type(model.x) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_weight_has_the_dtype_that_the_model_runs_in(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=bias), nn.LayerNorm(32)).bfloat16()
    lk.quantize_(model)
    model.float()
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=["0"]))
    x = torch.randn(2, 64)
    y = model(x)
    lk.dequantize_(model)
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    other = quantised()
    lk.dequantize_(other, torch.float16)
    assert other[0].weight.dtype == torch.float16


def test_hooks_and_shared_bases_stop_a_merge() -> None:
    model = quantised(r=2)
    model[0].register_forward_hook(lambda module, args, y: y)
    with pytest.raises(ValueError, match=r"0: it carries hooks or a replaced forward.*nothing has changed"):
        lk.merge_and_unload(model, requantize="nearest")
    for base in (CodedLinear(NF4Weight.from_dense(torch.randn(64, 64))), nn.Linear(64, 64)):
        shared = nn.Sequential(LoRALinear(base, r=4), LoRALinear(base, r=4))
        with pytest.raises(ValueError, match="expected a base layer for each, but 0 and 1 have one"):
            lk.merge_and_unload(shared, requantize=None if type(base) is nn.Linear else "nearest")
    with pytest.raises(ValueError, match="expected requantize to be one of nearest, stochastic, got 'up'"):
        lk.merge_and_unload(nn.Sequential(LoRALinear(nn.Linear(8, 8), r=2)), requantize="up")


def test_a_bias_of_bs_has_the_dtype_of_x() -> None:
    layer = LoRALinear(
        CodedLinear(NF4Weight.from_dense(torch.randn(32, 64).bfloat16()), torch.randn(32)), 2, lora_bias=True
    )
    nn.init.normal_(layer.lora_B.bias)
    layer.float()
    known = layer.base_layer.bias + layer.scaling * layer.lora_B.bias
    torch.testing.assert_close(layer(torch.zeros(1, 64))[0], known)


def test_methods_that_need_a_dense_weight_refuse_before_they_change_anything() -> None:
    model, x = quantised(r=4), torch.randn(2, 64)
    y = model(x)
    with pytest.raises(ValueError, match=r"lora_ga: expected dense weights.*stored as nf4 in 0; lk.dequantize_"):
        lk.init.lora_ga_(model, {"0": torch.randn(48, 64), "1": torch.randn(64, 48)})
    assert torch.equal(model(x), y)
    plain = quantised()
    linears = {"0": plain[0]}
    with pytest.raises(ValueError, match=r"estimate_gradients: expected dense weights.*stored as nf4 in 0"):
        lk.init.estimate_gradients(plain, [x], lambda m, batch: m(batch).sum(), linears)
    model = quantised(r=4, train="b")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    with pytest.raises(
        ValueError,
        match=r"0 cannot: its weight of torch\.uint8 is quantised",
    ):
        lk.chain.rac_lora(model, optimizer, steps_per_link=2)
    stack = lk.LoRAStack.from_factors([(torch.randn(2, 64), torch.randn(48, 2), 1.0)])
    layer = lk.nn.MultiLoRALinear(plain[0], stack)
    with pytest.raises(ValueError, match=r"got one stored as nf4; lk\.dequantize_ makes it dense"):
        layer.merge_(0)


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


i32, e4m3 = torch.int32, torch.float8_e4m3fn
WRONG: dict[str, tuple[Any, str]] = {
    "a linear": (lambda: lk.quantize_(nn.Linear(64, 64)), "expected a model, got an nn.Linear by itself"),
    "a coded linear": (lambda: lk.dequantize_(quantised()[0]), "expected a model, got a linear by itself"),
    "an adapted model": (lambda: lk.quantize_(quantised(r=2)), "expected a model that is not adapted yet"),
    "no zero points": (
        lambda: GPTQWeight(torch.Size((8, 32)), torch.float32, zeros(4, 8, dtype=i32), torch.ones(1, 8), block=(1, 32)),
        "GPTQWeight: expected zero points for codes in words",
    ),
    "fp8 grid": (
        lambda: FP8Weight.from_tensors(
            {"a": zeros(256, 128).view(e4m3), "a_scale_inv": torch.ones(1, 2)}, "a", block=(128, 64)
        ),
        r"a_scale_inv: FP8Weight: expected scales of shape \(2, 2\), got \(1, 2\)",
    ),
    "fp8 block": (lambda: FP8Weight.from_dense(torch.randn(4, 4), (0, 8)), "expected block to be"),
    "fp8 vector": (lambda: FP8Weight.from_tensors({"a": zeros(8).view(e4m3)}, "a"), r"expected a of shape \(N, K\)"),
    "mxfp4 shape": (lambda: MXFP4Weight.of_blocks(zeros(16, 4), zeros(4, 1), torch.float32), r"codes \(N, K / 2\)"),
    "mxfp4 vector": (lambda: MXFP4Weight.of_blocks(zeros(16), zeros(1), torch.float32), r"codes \(N, K / 2\)"),
    "nvfp4 shape": (
        lambda: NVFP4Weight.of_blocks(zeros(16, 4), zeros(8, 1).view(e4m3), 1.0, torch.float32),
        r"codes \(N, K / 2\)",
    ),
    "int4 words": (
        lambda: Int4Weight.of_groups(zeros(4, 8, dtype=i32), torch.ones(8, 1), 32, torch.float32),
        r"expected words of shape \(N, K / 8\) = \(8, 4\)",
    ),
    "int4 vector": (
        lambda: Int4Weight.of_groups(zeros(4, 8, dtype=i32), torch.ones(8), 32, torch.float32),
        r"expected words \(N, K / 8\) and scales",
    ),
    "gptq vector": (
        lambda: GPTQWeight.of_words(zeros(4, dtype=i32), zeros(1, 1, dtype=i32), torch.ones(1, 8), None, "gptq"),
        "expected qweight to be a matrix",
    ),
    "too large": (
        lambda: NF4Weight.from_dense(torch.full((4, 64), 1e6), dtype=torch.float16),
        "expected weight to hold numbers that torch.float16 has",
    ),
    "too large for float32": (
        lambda: NF4Weight.from_dense(torch.full((4, 64), 1e300, dtype=torch.float64), dtype=torch.float32),
        "expected weight to hold finite numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_weight_on_the_meta_device_is_left_and_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Linear(8, 64))
    report = lk.quantize_(model)
    assert [(s.name, s.reason) for s in report.skipped] == [("0", "its weight is on the meta device; load it first")]


def test_the_smallest_numbers_stay_finite() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0] = 1e-43
    assert bool(FP8Weight.from_dense(weight).dense().isfinite().all())
