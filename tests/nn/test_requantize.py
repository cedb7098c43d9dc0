"""Merging into a weight of few bits, and making one dense again."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels import weights
from lowrank_kernels.nn import CodedLinear, DoRALinear, LoRALinear
from lowrank_kernels.weights import FP4Weight, FP8Weight, Int8Weight, MXFP4Weight, NF4Weight

KINDS: tuple[Any, ...] = (NF4Weight, FP4Weight, Int8Weight, FP8Weight, MXFP4Weight)
by_format = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.format)


def weight_of(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5


def layer_over(kind: Any, size: float, wraps: type[LoRALinear] = LoRALinear, **options: Any) -> LoRALinear:
    """A layer over codes, whose correction is about ``size`` times the weight."""
    torch.manual_seed(1)
    base = CodedLinear(kind.from_dense(weight_of(96, 128)), torch.randn(96))
    layer = wraps(base, 4, alpha=4, **options)
    with torch.no_grad():
        layer.lora_A.weight.normal_()
        layer.lora_B.weight.normal_()
        correction = layer.lora_B.weight @ layer.lora_A.weight
        layer.lora_B.weight *= size * weight_of(96, 128).norm() / correction.norm()
    return layer


@by_format
def test_stochastic_codes_have_the_mean_of_what_they_round(kind: Any) -> None:
    given = weight_of(16, 64)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack(
        [kind.from_dense(given, rounding="stochastic", generator=generator).dense() for _ in range(400)]
    )
    variance, off = drawn.var(0) / 400, drawn.mean(0) - given
    inside = given.abs() < 0.99 * drawn.abs().amax(
        0
    )  # of MXFP4, what is more than 6 times its scale becomes 6 times it
    for part in (given > 0, given < 0, given.abs() < 0.05):
        part = part & inside
        assert off[part].sum().abs() < 5 * variance[part].sum().sqrt() + 1e-6 * part.sum()
        assert variance[part].mean() > 0
    nearest = kind.from_dense(given).dense()
    distance = (drawn - given).abs().amax(0)
    assert bool(((nearest - given).abs() <= distance + 1e-6).all())  # neighbours, the nearest one of them


@by_format
@pytest.mark.parametrize("wraps", [LoRALinear, DoRALinear])
def test_a_merge_is_of_the_merged_values_and_is_taken_out_whole(kind: Any, wraps: Any) -> None:
    layer = layer_over(kind, 0.5, wraps)
    x = torch.randn(5, 128)
    before = {name: t.clone() for name, t in layer.state_dict().items() if isinstance(t, Tensor)}
    y, old = layer(x), layer.base_layer.stored_weight().dense()
    dense = wraps(nn.Linear(128, 96), 4, alpha=4)
    dense.load_state_dict({**layer.state_dict(), "base_layer.weight": old}, strict=False)
    dense.merge_()
    layer.merge_(requantize="nearest")
    merged = layer.base_layer.stored_weight().dense()
    assert torch.equal(merged, kind.from_dense(dense.base_layer.weight.detach()).dense())
    report = layer.requantized
    update = dense.base_layer.weight.detach() - old
    assert report.kept == pytest.approx(float(((merged - old) * update).sum() / update.square().sum()), rel=1e-3)
    assert report.error == pytest.approx(float((merged - dense.base_layer.weight).norm() / update.norm()), rel=1e-3)
    assert 0.5 < report.kept < 1.2 and report.error < 1.0
    torch.testing.assert_close(layer(x), x @ merged.T + layer.bias, rtol=1e-4, atol=1e-4)
    while_merged = layer.state_dict()
    assert all(torch.equal(while_merged[name], t) for name, t in before.items())
    layer.unmerge_()
    assert layer.requantized is None
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in before.items())
    assert torch.equal(layer(x), y)


def test_a_small_update_is_lost_by_the_nearest_and_kept_on_average_by_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nearest = layer_over(NF4Weight, 0.01)
    with caplog.at_level(logging.WARNING, logger="lowrank_kernels"):
        nearest.merge_(requantize="nearest")
    assert nearest.requantized.kept < 0.2
    assert f"the weight keeps {nearest.requantized.kept:.1%} of the update" in caplog.text
    kept = []
    for _ in range(30):
        layer = layer_over(NF4Weight, 0.01)
        torch.manual_seed(len(kept))
        layer.merge_(requantize="stochastic")
        kept.append(layer.requantized.kept)
    mean = torch.tensor(kept)
    assert abs(mean.mean() - 1.0) < 4 * mean.std() / 30**0.5 + 0.01 and layer.requantized.error > 1


def test_a_bias_of_bs_is_merged_and_taken_out() -> None:
    layer = layer_over(NF4Weight, 0.5, lora_bias=True)
    with torch.no_grad():
        layer.lora_B.bias.normal_()
    bias = layer.base_layer.bias.clone()
    layer.merge_(requantize="nearest")
    torch.testing.assert_close(layer.base_layer.bias, bias + layer.scaling * layer.lora_B.bias)
    torch.testing.assert_close(layer.state_dict()["base_layer.bias"], bias)
    layer.unmerge_()
    torch.testing.assert_close(layer.base_layer.bias, bias)


def model_of(format_: str = "nf4") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    lk.quantize_(model, format_)
    lk.adapt(model, lk.LoRAConfig(r=4, target_modules=["0", "1"], init="gaussian"))
    with torch.no_grad():
        for layer in model:
            layer.lora_B.weight.normal_(std=0.3)
    return model


def test_a_model_is_merged_into_its_few_bits_or_into_dense_ones() -> None:
    model, x = model_of(), torch.randn(3, 64)
    y = model(x)
    with pytest.raises(ValueError, match=r"got one stored as nf4; make it dense \(lk.dequantize_\).*nothing has chan"):
        lk.merge_and_unload(model)
    assert torch.equal(model(x), y)
    report = lk.dequantize_(model, torch.float32)
    assert [r.name for r in report.replaced] == ["0.base_layer", "1.base_layer"]
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    lk.merge_and_unload(model)
    assert all(type(m) is nn.Linear for m in model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)

    model = model_of("int8")
    y = model(x)
    lk.merge_and_unload(model, requantize="nearest")
    assert all(type(m) is CodedLinear for m in model)
    torch.testing.assert_close(model(x), y, rtol=0.05, atol=0.05 * float(y.detach().abs().max()))


def test_what_cannot_be_merged_or_made_dense_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected requantize to be one of nearest, stochastic, got 'up'"):
        layer_over(NF4Weight, 0.1).merge_(requantize="up")
    with pytest.raises(ValueError, match="expected requantize=None for a dense weight, got 'nearest'"):
        LoRALinear(nn.Linear(8, 8), 2).merge_(requantize="nearest")
    with pytest.raises(ValueError, match="expected rounding to be one of nearest, stochastic, got 'down'"):
        NF4Weight.from_dense(weight_of(4, 64), rounding="down")
    with pytest.raises(ValueError, match="expected a model with weights of few bits, got none"):
        lk.dequantize_(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        lk.dequantize_(torch.zeros(1))
    model = model_of()
    model[0].merge_(requantize="nearest")
    with pytest.raises(ValueError, match=r"0\.base_layer: an adapter is merged into it; call unmerge_"):
        lk.dequantize_(model)
    other = weights.NVFP4Weight.of_blocks(
        torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 4).to(torch.float8_e4m3fn), 1.0, torch.float32
    )
    with pytest.raises(ValueError, match="NVFP4Weight: expected a format with an encoder"):
        LoRALinear(CodedLinear(other), 2).merge_(requantize="nearest")


def test_nothing_is_merged_where_a_factor_is_not_finite() -> None:
    layer = layer_over(NF4Weight, 0.5)
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_A.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite factors"):
        layer.merge_(requantize="nearest")
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
