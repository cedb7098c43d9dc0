"""LoRALinear: numbers against float64, merging, and everything a module is expected to survive."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lowrank_kernels.nn import DoRALinear, LoRALinear
from lowrank_kernels.reference import dropout_keep_mask_ref


def make(k=24, n=16, r=4, dtype=torch.float32, bias=True, **settings):
    layer = LoRALinear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), r, **settings)
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.3)
        if layer.lora_B.bias is not None:
            layer.lora_B.bias.normal_()
    return layer


def float64_forward(layer, x):
    w, a, b = (t.detach().double() for t in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    y = x.double() @ w.T + layer.scaling * (x.double() @ a.T @ b.T)
    for bias, s in ((layer.bias, 1.0), (layer.lora_B.bias, layer.scaling)):
        y = y if bias is None else y + s * bias.detach().double()
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_forward_is_the_formula(bias, lora_bias, rslora):
    layer = make(bias=bias, lora_bias=lora_bias, rslora=rslora, alpha=6.0)
    assert layer.scaling == (6.0 / 2.0 if rslora else 6.0 / 4)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(layer(x).double(), float64_forward(layer, x), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_over_a_half_precision_base(dtype):
    layer = make(k=64, n=48, dtype=dtype)
    assert layer.lora_A.weight.dtype == torch.float32
    x = torch.randn(33, 64, dtype=dtype)
    exact = float64_forward(layer, x)
    w = layer.weight.double()
    eager = nn.functional.linear(x, layer.weight, layer.bias) + layer.scaling * (
        x @ layer.lora_A.weight.to(dtype).T @ layer.lora_B.weight.to(dtype).T
    )
    error = (layer(x).double() - exact).abs().max()
    eps = torch.finfo(dtype).eps
    assert error <= 2 * (eager.double() - exact).abs().max() + 2 * eps * w.abs().max()
    layer(x).float().square().sum().backward()
    assert layer.lora_A.weight.grad.dtype == torch.float32


def test_gradients_reach_the_factors_alone_and_add_up_over_backwards():
    layer = make(lora_bias=True)
    x = torch.randn(7, 24)
    layer(x).square().sum().backward()
    once = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    assert set(once) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    w, a, b, s = layer.weight.detach(), layer.lora_A.weight, layer.lora_B.weight, layer.scaling
    plain = x @ w.T + layer.bias.detach() + s * (x @ a.T @ b.T + layer.lora_B.bias)
    expected = torch.autograd.grad(plain.square().sum(), (a, b, layer.lora_B.bias))
    for name, grad in zip(once, expected, strict=True):
        torch.testing.assert_close(once[name], grad, rtol=2e-5, atol=2e-5)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        if name in once:
            torch.testing.assert_close(p.grad, 2 * once[name])


@pytest.mark.parametrize(("train", "trained", "zero"), [("a", "lora_A", "lora_A"), ("b", "lora_B", "lora_B")])
def test_one_sided_training_samples_the_frozen_factor(train, trained, zero):
    layer = LoRALinear.from_linear(nn.Linear(12, 10), 3, train=train)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [f"{trained}.weight"]
    frozen = {"lora_A": "lora_B", "lora_B": "lora_A"}[zero]
    assert getattr(layer, zero).weight.count_nonzero() == 0
    assert getattr(layer, frozen).weight.count_nonzero() > 0
    layer(torch.randn(5, 12)).square().sum().backward()
    assert getattr(layer, trained).weight.grad.count_nonzero() > 0
    assert getattr(layer, frozen).weight.grad is None


def test_dropout_runs_in_training_alone_with_the_ops_own_mask():
    layer = make(dropout=0.4, alpha=8.0)
    x = torch.randn(9, 24)
    torch.testing.assert_close(layer.eval()(x), make_without_dropout(layer)(x), rtol=0, atol=0)
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    keep = dropout_keep_mask_ref(seed, 9, 24, 0.4)
    assert 0 < keep.sum() < keep.numel()
    dropped = torch.where(keep, x, 0.0) / 0.6
    expected = layer.base_layer(x) + layer.scaling * (dropped @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


def make_without_dropout(layer):
    twin = copy.deepcopy(layer)
    twin.dropout = 0.0
    return twin.train()


def test_weight_is_shared_and_frozen_and_readable():
    linear = nn.Linear(8, 6)
    layer = LoRALinear.from_linear(linear, 2)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    assert (layer.in_features, layer.out_features) == (8, 6)
    text = repr(layer)
    assert "in_features=8, out_features=6" in text and "r=2" in text and "merged=False" in text


def test_parameter_names_are_pefts():
    names = set(make(lora_bias=True).state_dict())
    assert names == {"base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight", "lora_B.bias"}


def test_training_mode_is_that_of_the_linear():
    assert not LoRALinear.from_linear(nn.Linear(4, 4).eval(), 2).training
    assert LoRALinear.from_linear(nn.Linear(4, 4), 2).training


# -------------------------------------------------------------------------------------------------------------- merging


def exact_merge(layer):
    """W + s B A in float64."""
    w, a, b = (t.detach().double() for t in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    return w + layer.scaling * b @ a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_bias", [True, False])
def test_merge_rounds_once(dtype, lora_bias):
    layer = make(k=40, n=30, dtype=dtype, lora_bias=lora_bias)
    exact = exact_merge(layer)
    assert layer.merge_() is layer and layer.merged
    if dtype == torch.float32:
        ulp = torch.finfo(dtype).eps * exact.abs().max()
        torch.testing.assert_close(layer.weight.double(), exact, rtol=0, atol=2 * ulp)
    else:  # float32 sums, rounded once, are the rounded exact sums but for near ties
        assert (layer.weight == exact.to(dtype)).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_bias", [True, False])
def test_a_merged_layer_is_its_linear(dtype, lora_bias):
    layer, x = make(k=40, n=30, dtype=dtype, lora_bias=lora_bias).merge_(), torch.randn(5, 40, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_bias", [True, False])
def test_unmerge_comes_back_to_within_one_rounding(dtype, lora_bias):
    layer = make(k=40, n=30, dtype=dtype, lora_bias=lora_bias)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    ulp = torch.finfo(dtype).eps * exact_merge(layer).abs().max()
    layer.merge_()
    bias_ulp = torch.finfo(dtype).eps * layer.bias.abs().max()
    layer.unmerge_()
    assert (layer.weight.double() - before.double()).abs().max() <= ulp
    assert (layer.bias.double() - bias.double()).abs().max() <= bias_ulp
    assert not layer.merged


def test_merging_keeps_the_function():
    layer = make(lora_bias=True).eval()
    x = torch.randn(6, 24)
    y = layer(x)
    torch.testing.assert_close(layer.merge_()(x), y, rtol=2e-6, atol=2e-6)


def test_merging_twice_is_merging_once():
    layer = make()
    once = layer.merge_().weight.detach().clone()
    assert torch.equal(layer.merge_().weight, once)
    before = layer.unmerge_().weight.detach().clone()
    assert torch.equal(layer.unmerge_().weight, before)


def test_unmerge_takes_out_what_was_merged_even_when_the_factors_changed():
    layer = make()
    before = layer.weight.detach().clone()
    layer.merge_()
    with torch.no_grad():
        layer.lora_A.weight.zero_()
    torch.testing.assert_close(layer.unmerge_().weight, before, rtol=1e-6, atol=1e-6)


def test_merge_refuses_what_would_spoil_the_weight_and_changes_nothing():
    for spoil, match in (
        (lambda layer: layer.lora_B.weight.data.fill_(math.nan), "finite"),
        (lambda layer: setattr(layer, "weight_shared_with", ("embed.weight",)), r"also that of embed\.weight"),
    ):
        layer = make()
        spoil(layer)
        before = layer.weight.detach().clone()
        with pytest.raises(ValueError, match=match):
            layer.merge_()
        assert torch.equal(layer.weight, before) and not layer.merged
    with pytest.raises(ValueError, match="a base layer with a bias"):
        make(bias=False, lora_bias=True).merge_()


def test_state_dict_of_a_merged_layer_is_the_unmerged_one():
    layer = make(lora_bias=True)
    model = nn.Sequential(nn.Linear(24, 24), layer)
    x = torch.randn(4, 24)
    y = model(x).detach()
    plain = {n: t.clone() for n, t in model.state_dict().items()}
    layer.merge_()
    state = model.state_dict()
    assert list(state) == list(plain)
    for name, t in plain.items():
        torch.testing.assert_close(state[name], t, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight, layer.merge_().weight)
    fresh = nn.Sequential(nn.Linear(24, 24), make(lora_bias=True).merge_())
    fresh.load_state_dict(state)
    assert not fresh[1].merged
    torch.testing.assert_close(fresh(x), y, rtol=2e-6, atol=2e-6)


def test_loading_the_factors_alone_leaves_a_merged_layer_merged():
    layer = make()
    before = layer.weight.detach().clone()
    layer.merge_()
    layer.load_state_dict({"lora_A.weight": torch.zeros(4, 24)}, strict=False)
    assert layer.merged
    torch.testing.assert_close(layer.unmerge_().weight, before, rtol=1e-6, atol=1e-6)


def merged(kind):
    layer = kind(nn.Linear(24, 16), 4, **({"lora_bias": True} if kind is LoRALinear else {}))
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.add_(0.5 * torch.rand(p.shape))
    x = torch.randn(6, 24)
    y = layer(x).detach()
    layer.merge_()
    return layer, x, y


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize(
    "given", [{"base_layer.weight": torch.zeros(3, 3)}, {"base_layer.bias": torch.zeros(3)}], ids=["weight", "bias"]
)
def test_a_load_that_fails_leaves_a_merged_layer_right(kind, given):
    layer, x, y = merged(kind)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**layer.state_dict(), **given})
    torch.testing.assert_close(layer(x), y, rtol=2e-5, atol=2e-5)
    layer.unmerge_()
    torch.testing.assert_close(layer(x), y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("absent", ["base_layer.weight", "base_layer.bias"])
@pytest.mark.parametrize("assign", [False, True])
def test_what_a_state_does_not_hold_is_unmerged_as_well(kind, absent, assign):
    layer, x, y = merged(kind)
    state = {name: t.clone() for name, t in layer.state_dict().items() if name != absent}
    layer.load_state_dict(state, strict=False, assign=assign)
    assert not layer.merged
    torch.testing.assert_close(layer(x), y, rtol=2e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------------- a good module


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    yield torch.load(buffer, weights_only=False)
    twin = make(lora_bias=True)
    twin.load_state_dict(layer.state_dict())
    yield twin


@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_are_independent(merged):
    layer = make(lora_bias=True).eval()
    x = torch.randn(3, 24)
    if merged:
        layer.merge_()
    y = layer(x).detach()
    seen = 0
    for twin in copies(layer):
        torch.testing.assert_close(twin.eval()(x), y, rtol=2e-6, atol=2e-6)
        twin.unmerge_()
        with torch.no_grad():
            twin.base_layer.weight.zero_()
            twin.lora_A.weight.zero_()
        assert torch.equal(layer(x), y)
        seen += 1
    assert seen == 4


def test_dtype_and_device_moves():
    layer = make().to(torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer(torch.randn(2, 24, dtype=torch.float64)).dtype == torch.float64
    layer.to(torch.bfloat16)
    assert layer(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.device.type for p in make().to("meta").parameters()} == {"meta"}
    merged = make().merge_().double()
    assert (merged.unmerge_().weight - merged.weight).abs().max() == 0


def test_tied_weights_stay_tied():
    embedding, head = nn.Embedding(16, 24), nn.Linear(24, 16, bias=False)
    head.weight = embedding.weight
    layer = LoRALinear.from_linear(head, 2)
    assert layer.weight is embedding.weight
    with torch.no_grad():
        embedding.weight.mul_(2)
    torch.testing.assert_close(layer(torch.ones(1, 24)), nn.functional.linear(torch.ones(1, 24), embedding.weight))


def test_factors_take_the_asked_dtype():
    assert make(dtype=torch.bfloat16).lora_A.weight.dtype == torch.float32
    assert make(dtype=torch.float64).lora_B.weight.dtype == torch.float64
    layer = LoRALinear.from_linear(nn.Linear(4, 4), 2, dtype=torch.bfloat16)
    assert layer.lora_A.weight.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------------- errors


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda *args: None)
    return linear


def test_resizing_keeps_the_parameters_and_starts_them_at_zero():
    layer = make(r=4, alpha=6.0)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.resize_(2) is layer and layer.scaling == 3.0
    assert layer.lora_A.weight is a and layer.lora_B.weight is b and a.grad is None and b.grad is None
    assert a.shape == (2, 24) and b.shape == (16, 2) and not a.any() and not b.any()
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_resizing_to_what_cannot_be_changes_nothing():
    layer = make(r=4, alpha=6.0).resize_(2)
    with pytest.raises(ValueError, match=r"LoRALinear\.resize_: expected r to be an integer of at least 1, got 0"):
        layer.resize_(0)
    with pytest.raises(ValueError, match=r"LoRALinear\.resize_: expected an unmerged layer"):
        layer.merge_().resize_(1)
    assert layer.r == 2


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (lambda: nn.Conv1d(4, 4, 1), "not an nn.Linear but a Conv1d"),
        (lambda: LoRALinear.from_linear(nn.Linear(4, 4), 2), "already adapted"),
        (lambda: OwnForward(4, 4), "forward of its own"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrize"),
        (hooked, "hooks"),
        (lambda: nn.LazyLinear(4), "LazyLinear|UninitializedParameter"),
    ],
)
def test_bases_that_cannot_be_wrapped_are_named(base, match):
    with pytest.raises(TypeError, match=match):
        LoRALinear.from_linear(base(), 2)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"r": 0}, ValueError, "r to be an integer of at least 1, got 0"),
        ({"r": 2.0}, ValueError, "r to be an integer"),
        ({"r": True}, ValueError, "r to be an integer"),
        ({"alpha": math.inf}, ValueError, "alpha to be a finite number"),
        ({"dropout": 1.0}, ValueError, "0 <= dropout < 1"),
        ({"train": "c"}, ValueError, "train to be one of both, a, b"),
        ({"init": "ones"}, ValueError, "init to be one of kaiming"),
        ({"dtype": torch.int8}, TypeError, "floating dtype"),
    ],
)
def test_wrong_settings_are_named(settings, error, match):
    linear = nn.Linear(4, 4)
    with pytest.raises(error, match=match):
        LoRALinear.from_linear(linear, **{"r": 2, **settings})
    assert linear.weight.requires_grad and linear.bias.requires_grad
