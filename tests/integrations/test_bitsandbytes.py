"""Modules and checkpoints of bitsandbytes: read to the bit, and trained over as PEFT does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.weights import FP4Weight, Int8Weight, NF4Weight, of

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
FOUR = {"nf4": NF4Weight, "fp4": FP4Weight}


def linear4(kind: str, nested: bool, n: int = 96, k: int = 128, **options: Any) -> nn.Module:
    plain = nn.Linear(k, n)
    made: nn.Module = bnb.nn.Linear4bit(k, n, quant_type=kind, compress_statistics=nested, **options)
    made.load_state_dict(plain.state_dict())
    return made.to("cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", FOUR)
def test_a_live_linear4bit_is_read_to_the_bit(kind: str, nested: bool) -> None:
    module = linear4(kind, nested)
    weight = of(module)
    assert type(weight) is FOUR[kind] and weight.shape == (96, 128)
    assert torch.equal(weight.dense(), bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", FOUR)
def test_its_checkpoint_is_read_to_the_bit(kind: str, nested: bool) -> None:
    module = linear4(kind, nested)
    known = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    tensors = {f"a.{name}": t for name, t in module.state_dict().items()}
    assert torch.equal(FOUR[kind].from_tensors(tensors, "a.weight").dense(), known)


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(64, 128), (37, 50), (48, 100)])
@pytest.mark.parametrize("kind", FOUR)
def test_our_encoder_gives_its_codes(kind: str, shape: tuple[int, int], block_size: int) -> None:
    given = torch.randn(shape)
    codes, state = bnb.functional.quantize_4bit(given, blocksize=block_size, quant_type=kind)
    weight = FOUR[kind].from_dense(given, block_size)
    assert torch.equal(weight.codes, codes.reshape(-1)) and torch.equal(weight.scales, state.absmax)


def test_int8_is_read_and_encoded_to_the_bit() -> None:
    plain = nn.Linear(128, 96)
    module = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False)
    module.load_state_dict(plain.state_dict())
    module.to("cpu")
    known = module.weight.CB.float() * (module.weight.SCB * (1.0 / 127.0))[:, None]
    assert torch.equal(of(module).to(torch.float32).dense(), known)
    assert torch.equal(Int8Weight.from_dense(plain.weight).codes, module.weight.CB)
    module(torch.randn(3, 128).half())  # its state moves from the weight into the module
    assert torch.equal(of(module).to(torch.float32).dense(), known)


def test_a_weight_that_evaluation_laid_out_anew_is_refused() -> None:
    module = linear4("nf4", False, compute_dtype=torch.bfloat16).eval()
    with torch.no_grad():
        module(torch.randn(2, 128).bfloat16())
    if not getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor has no kernel of bitsandbytes that lays weights out anew")
    with pytest.raises(ValueError, match="laid out anew for evaluation on this CPU"):
        of(module)


def peft_and_ours(kind: str, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """y and the gradients of x, A and B: of PEFT over the module, ours, and in float64."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = nn.Sequential(linear4(kind, True, compute_dtype=torch.float32))
    weight = of(base[0])
    peft_model = peft.get_peft_model(base, peft.LoraConfig(r=5, target_modules=["0"], init_lora_weights=False))
    layer = peft_model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bias, scaling = layer.base_layer.bias, layer.scaling["default"]
    grad = torch.randn(x.shape[0], 96)
    results = []
    for call, operands in (
        (lambda x, a, b: peft_model(x), (x, a, b)),
        (lambda x, a, b: lk.lora_linear(x, weight, a, b, bias, scaling=scaling), (x, a, b)),
        (
            lambda x, a, b: nn.functional.linear(x, weight.dense().double() + scaling * b @ a, bias.double()),
            [t.detach().double().requires_grad_() for t in (x, a, b)],
        ),
    ):
        y = call(*operands)
        results.append([y.detach(), *torch.autograd.grad(y, operands, grad.to(y.dtype))])
    return results[0], results[1], results[2]


@pytest.mark.parametrize("rows", [1, 20, 200])
@pytest.mark.parametrize("kind", FOUR)
def test_outputs_and_gradients_are_as_near_to_float64_as_pefts(kind: str, rows: int) -> None:
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).requires_grad_()
    theirs, ours, exact = peft_and_ours(kind, x)
    for known, mine, true in zip(theirs, ours, exact, strict=True):
        bound = 2 * (known.double() - true).abs().max() + 4 * torch.finfo(torch.float32).eps * true.abs().max()
        assert (mine.double() - true).abs().max() <= bound


@pytest.mark.parametrize("config", [lk.LoRAConfig(r=4), lk.DoRAConfig(r=4)], ids=lambda c: type(c).__name__)
def test_a_model_of_such_linears_is_adapted_and_trained(config: Any) -> None:
    model = nn.Sequential(linear4("nf4", True), nn.Tanh(), linear4("fp4", False, 8, 96))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = lk.adapt(model, config)
    assert [r.name for r in report.replaced] == ["0", "2"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, losses = torch.randn(16, 128), []
    for _ in range(5):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, t in before.items():
        kept = model.state_dict()[name.replace("0.", "0.base_layer.").replace("2.", "2.base_layer.")]
        assert torch.equal(kept, t)
    with pytest.raises(ValueError, match="expected a dense weight"):
        model[0].merge_()


def peft_over(kind: str, config: Any) -> Any:
    """A PeftModel over two linears of bitsandbytes'."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    if kind == "int8":
        layers = []
        for n, k in ((96, 64), (64, 96)):
            module = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False)
            module.load_state_dict(nn.Linear(k, n).state_dict())
            layers.append(module.to("cpu"))
    else:
        layers = [linear4(kind, True, n, k, compute_dtype=torch.float32) for n, k in ((96, 64), (64, 96))]
    base = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind != "int8", kind == "int8"
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_pefts_layers_run_on_the_ops(kind: str, dora: bool) -> None:
    """PEFT's own forward runs once: over int8 its second one with DoRA raises (findings/peft_int8_dora.sh)."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=dora, init_lora_weights=False)
    model = peft_over(kind, config)
    layers = [model.base_model.model[i] for i in (0, 2)]
    classes = [type(layer) for layer in layers]
    assert all(c.__module__ == "peft.tuners.lora.bnb" for c in classes)
    x = torch.randn(7, 64)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]

    before = run()
    report = lk.integrations.peft.accelerate(model)
    assert len(report.replaced) == 2 and not report.skipped
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    close = {"rtol": 0.05, "atol": 0.05} if kind == "int8" else {"rtol": 1e-4, "atol": 1e-4}  # int8: PEFT in float16
    for ours, theirs in zip(run(), before, strict=True):
        torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), **close)
    report.undo()
    assert [type(layer) for layer in layers] == classes


def test_a_layer_whose_weight_cannot_be_read_is_left_as_it_is() -> None:
    model = nn.Sequential(linear4("nf4", False), nn.Linear(96, 8))
    model[0].weight.quant_state.packing_format_for_cpu = True  # as its evaluation on some processors leaves it
    report = lk.adapt(model, lk.LoRAConfig(r=2))
    assert [r.name for r in report.replaced] == ["1"]
    assert "laid out anew for evaluation on this CPU" in dict((s.name, s.reason) for s in report.skipped)["0"]
