"""LoRA and DoRA over convolutions, and over transformers' Conv1D: numbers against float64, merging, what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.nn import (
    DoRAConv1d,
    DoRAConv2d,
    DoRAConv3d,
    DoRALinear,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRALinear,
    conv,
)
from lowrank_kernels.reference import lora_conv_ref
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

# name: (convolution, shape of x)
CASES = {
    "3×3": (lambda **o: nn.Conv2d(5, 8, 3, padding=1, **o), (2, 5, 9, 7)),
    "1×1": (lambda **o: nn.Conv2d(5, 8, 1, **o), (2, 5, 4, 3)),
    "patches": (lambda **o: nn.Conv2d(3, 8, (4, 2), stride=(4, 2), **o), (2, 3, 11, 8)),
    "patches 3-D": (lambda **o: nn.Conv3d(2, 8, 2, stride=2, **o), (2, 2, 4, 5, 4)),
    "strides": (lambda **o: nn.Conv2d(4, 8, (3, 2), stride=(1, 3), padding=(0, 1), bias=False, **o), (2, 4, 8, 9)),
    "same, even kernel": (lambda **o: nn.Conv1d(4, 8, 4, padding="same", **o), (3, 4, 10)),
    "valid": (lambda **o: nn.Conv1d(4, 8, 3, padding="valid", **o), (3, 4, 10)),
    "whisper": (lambda **o: nn.Conv1d(4, 8, 3, stride=2, padding=1, **o), (3, 4, 11)),
    "3-D": (lambda **o: nn.Conv3d(2, 8, 3, padding=1, **o), (1, 2, 4, 5, 4)),
}
LAYERS = {
    nn.Conv1d: (LoRAConv1d, DoRAConv1d),
    nn.Conv2d: (LoRAConv2d, DoRAConv2d),
    nn.Conv3d: (LoRAConv3d, DoRAConv3d),
}


def make(case, dora, r=3, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    build, shape = CASES[case]
    base = build(dtype=dtype)
    layer = LAYERS[type(base)][dora].from_conv(base, r, **settings)
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.5)
        if layer.lora_bias is not None:
            layer.lora_bias.normal_()
        if dora:
            layer.lora_magnitude_vector.uniform_(0.5, 2.0)
    return layer, torch.randn(shape, dtype=dtype)


def reference(layer, x, dtype, **settings):
    """(y, {name: gradient}) of the dense formula in a dtype."""
    own = {name: p.detach().to(dtype).requires_grad_() for name, p, _ in layer.correction_parameters()}
    x, base = x.detach().to(dtype).requires_grad_(), layer.base_layer
    bias = None if base.bias is None else base.bias.detach().to(dtype)
    if "lora_B.bias" in own:
        extra = layer.scaling * own["lora_B.bias"]
        bias = extra if bias is None else bias + extra
    y = lora_conv_ref(
        x,
        base.weight.detach().to(dtype),
        own["lora_A"],
        own["lora_B"],
        own.get("lora_magnitude_vector"),
        bias,
        scaling=layer.scaling,
        stride=base.stride,
        padding=base.padding,
        **settings,
    )
    y.sin().sum().backward()
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in own.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_the_formula(case, dora):
    layer, x = make(case, dora, alpha=5.0)
    y = layer(x.requires_grad_())
    y.sin().sum().backward()
    exact, exact_grads = reference(layer, x, torch.float64)
    eager, eager_grads = reference(layer, x, torch.float32)
    assert_as_exact_as_eager(y.detach(), eager, exact)
    grads = {"x": x.grad} | {name: p.grad for name, p, _ in layer.correction_parameters()}
    for name, grad in grads.items():
        assert_as_exact_as_eager(grad, eager_grads[name], exact_grads[name], factor=GRADIENT_FACTOR, what=name)
    assert layer.weight.grad is None


@pytest.mark.parametrize("case", ["3×3", "patches", "whisper"])
def test_lora_bias_with_rslora_is_the_formula(case):
    layer, x = make(case, False, lora_bias=True, rslora=True)
    y, (exact, grads) = layer(x), reference(layer, x, torch.float64)
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=2e-6)
    y.sin().sum().backward()
    torch.testing.assert_close(layer.lora_bias.grad.double(), grads["lora_B.bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["3×3", "patches", "whisper"])
def test_lora_bias_is_merged(case):
    layer, x = make(case, False, lora_bias=True, rslora=True)
    y = layer(x)
    layer.merge_()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["3×3", "patches", "whisper"])
def test_gradients_through_the_norm_are_the_formula(case):
    layer, x = make(case, True, detach_norm=False)
    layer(x).sin().sum().backward()
    _, grads = reference(layer, x, torch.float64, detach_norm=False)
    for name, p, _ in layer.correction_parameters():
        torch.testing.assert_close(p.grad.double(), grads[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", ["3×3", "1×1", "patches", "same, even kernel"])
@pytest.mark.parametrize("library", [True, False])
def test_float32_factors_over_a_bfloat16_base(case, dora, library, monkeypatch):
    """Whether the library convolves or windows lie in rows: as exact as the convolution in bfloat16."""
    monkeypatch.setattr(conv, "library_convolves", lambda *_: library)
    layer, x = make(case, dora, dtype=torch.bfloat16)
    assert layer.lora_A.weight.dtype == torch.float32
    assert conv.lies_in_rows(x, layer.base_layer) == (case == "patches" or not library)
    y = layer(x)
    exact, _ = reference(layer, x, torch.float64)
    base = layer.base_layer
    a, b = (factor.weight.detach().bfloat16() for factor in (layer.lora_A, layer.lora_B))
    convolve = nn.functional.conv2d if x.dim() == 4 else nn.functional.conv1d
    p = convolve(x, a, None, base.stride, base.padding)
    eager = convolve(x, base.weight, None, base.stride, base.padding) + layer.scaling * convolve(p, b)
    if dora:
        eager = layer.over_output(layer.column_scale()).detach().bfloat16() * eager
    eager = eager + base.bias.view(-1, *(1 for _ in base.kernel_size))
    assert_as_exact_as_eager(y.detach(), eager.detach(), exact)
    y.float().square().sum().backward()
    assert layer.lora_A.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x.float()).float(), y.float(), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merging_and_back(case, dora):
    layer, x = make(case, dora)
    y, before = layer(x).detach(), layer.weight.detach().clone()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge_()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-6)
    layer.unmerge_()
    torch.testing.assert_close(layer.weight, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_in_channels_last_merges_too(dora):
    layer, x = make("3×3", dora)
    layer.base_layer.to(memory_format=torch.channels_last)
    y, before = layer(x).detach(), layer.weight.detach().clone()
    layer.merge_()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    layer.unmerge_()
    torch.testing.assert_close(layer.weight, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["3×3", "patches"])
@pytest.mark.parametrize("dropout_base", [None, False, True])
def test_dropout_in_training_alone(case, dropout_base):
    """The mean over masks is the output without; and with A = 0 nothing of LoRA's is dropped."""
    settings = {} if dropout_base is None else {"dropout_base": dropout_base}
    layer, x = make(case, dropout_base is not None, dropout=0.5, **settings)
    y = layer.eval()(x)
    assert torch.equal(layer(x), y)
    layer.train()
    torch.manual_seed(0)
    mean = torch.stack([layer(x).detach() for _ in range(600)]).mean(0)
    assert not torch.equal(layer(x), y)
    assert (mean - y).abs().mean() < 0.1 * y.abs().mean()
    if dropout_base is not True:
        layer.lora_A.weight.data.zero_()
        torch.testing.assert_close(layer(x), layer.eval()(x))


def of_some(test):
    """LoRA and DoRA over some of the convolutions."""
    test = pytest.mark.parametrize("dora", [False, True])(test)
    return pytest.mark.parametrize("case", ["3×3", "patches", "whisper"])(test)


@of_some
def test_copies_and_pickles_compute_the_same(case, dora):
    layer, x = make(case, dora)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@of_some
def test_a_single_input_and_an_empty_batch_are_taken(case, dora):
    layer, x = make(case, dora)
    y = layer(x)
    torch.testing.assert_close(layer(x[0]), y[0])
    assert layer(x[:0]).shape == (0, *y.shape[1:])


@of_some
@pytest.mark.parametrize("hooked", ["base_layer", "lora_A", "lora_B"])
def test_hooks_inside_are_called_and_change_nothing(case, dora, hooked):
    layer, x = make(case, dora)
    y, seen = layer(x), []
    layer.get_submodule(hooked).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), y[0], rtol=1e-5, atol=1e-5)
    assert seen


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", ["3×3", "patches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile(case, dora, dtype):
    layer, x = make(case, dora, dtype=dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_it_starts_as_the_convolution():
    for case in CASES:
        build, shape = CASES[case]
        base, x = build(), torch.randn(shape)
        for kind in LAYERS[type(base)]:
            layer = kind(copy.deepcopy(base), 2)
            assert layer.lora_A.weight.any() and not layer.lora_B.weight.any()
            torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-5)


def test_what_it_refuses():
    for module, words in (
        (nn.Conv2d(4, 4, 3, groups=2), "its groups=2: PEFT's factors mix all channels"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"its dilation=\(2, 2\): PEFT's factors have none"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "its padding_mode='circular': PEFT's factors pad"),
        (nn.Conv1d(4, 4, 3), "not an nn.Conv2d but a Conv1d"),
        (nn.ConvTranspose2d(4, 4, 3), "not an nn.Conv2d but a ConvTranspose2d"),
    ):
        with pytest.raises(TypeError, match=f"LoRAConv2d: expected a plain nn.Conv2d, .*{words}"):
            LoRAConv2d(module, 2)
        model = nn.Sequential(module, nn.Linear(4, 4))
        report = lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("0", "1")))
        kept = [s.name for s in report.skipped]
        assert ("0" in kept) == (not isinstance(module, nn.Conv1d)), words
    with pytest.raises(ValueError, match="DoRAConv2d: expected lora_bias to be False"):
        DoRAConv2d(nn.Conv2d(4, 4, 3), 2, lora_bias=True)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.mix = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.depthwise(torch.relu(self.mix(self.patch(x)))).mean((2, 3)))


@pytest.fixture(params=[(c, b) for c in (lk.LoRAConfig, lk.DoRAConfig) for b in ("none", "lora_only")], ids=str)
def trained(request):
    """(a model that was adapted and trained, its report, as it was before, x)."""
    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(model)
    config, bias = request.param
    report = lk.adapt(model, config(r=2, target_modules=("patch", "mix", "depthwise", "head"), bias=bias))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, report, before, x


def test_convolutions_of_a_model_are_adapted_but_for_grouped_ones(trained):
    _, report, _, _ = trained
    assert [r.shape for r in report.replaced] == [(8, 48), (8, 72), (5, 8)]
    assert [s.reason[:11] for s in report.skipped] == ["its groups="]


def test_adapted_convolutions_train(trained):
    model, _, before, x = trained
    assert (model(x) - before(x)).abs().max() > 1e-2


def test_adapted_convolutions_are_merged_into_plain_ones(trained):
    model, _, _, x = trained
    y = model(x)
    merged = lk.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)
    assert type(merged.patch) is nn.Conv2d


def test_undo_puts_the_convolutions_back(trained):
    model, report, before, x = trained
    report.undo()
    assert model.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(model(x), before(x))


# ------------------------------------------------------------------------------------------- transformers' Conv1D


class Conv1D(nn.Module):
    """As transformers has it: told by its name and sizes, since transformers is not needed."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


@pytest.fixture(params=[LoRALinear, DoRALinear], ids=lambda kind: kind.__name__)
def conv1d_and_linear(request):
    """(a layer over a Conv1D, the same over the linear of the transposed weight, x)."""
    torch.manual_seed(0)
    base, x = Conv1D(16, 24), torch.randn(2, 5, 24)
    linear = nn.Linear(24, 16)
    linear.weight.data, linear.bias.data = base.weight.detach().T.clone(), base.bias.detach().clone()
    layers = []
    for wrapped in (base, linear):
        torch.manual_seed(1)
        layers.append(request.param.from_linear(wrapped, 4))
        layers[-1].lora_B.weight.data.normal_(std=0.3)
    return *layers, x


def test_a_layer_over_conv1d_keeps_its_weight_and_tells_the_linears_sizes(conv1d_and_linear):
    layer, _, _ = conv1d_and_linear
    assert (layer.in_features, layer.out_features) == (24, 16) and layer.weight is layer.base_layer.weight
    assert layer.matrix.shape == (16, 24)


def test_a_layer_over_conv1d_is_that_over_the_transposed_weight(conv1d_and_linear):
    layer, twin, x = conv1d_and_linear
    torch.testing.assert_close(layer(x), twin(x), rtol=2e-6, atol=2e-6)


def test_gradients_over_conv1d_are_those_over_the_transposed_weight(conv1d_and_linear):
    layer, twin, x = conv1d_and_linear
    for one in (layer, twin):
        one(x).sin().sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


def test_a_layer_over_conv1d_is_merged_and_put_back(conv1d_and_linear):
    layer, _, x = conv1d_and_linear
    y, before = layer(x), layer.weight.detach().clone()
    layer.merge_()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict()["base_layer.weight"], before, rtol=1e-5, atol=1e-6)
    layer.unmerge_()
    torch.testing.assert_close(layer.weight, before, rtol=1e-5, atol=1e-6)


def test_a_hook_of_conv1d_changes_nothing(conv1d_and_linear):
    layer, _, x = conv1d_and_linear
    y = layer(x)
    layer.base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


def test_all_linear_takes_conv1d_and_other_methods_refuse_it():
    model = nn.ModuleDict({"c_attn": Conv1D(12, 8), "conv": nn.Conv1d(4, 4, 1), "embed": nn.Embedding(4, 4)})
    with pytest.raises(ValueError, match=r"c_attn \(transformers' Conv1D keeps its weight as \(in, out\)"):
        lk.adapt(model, lk.MultiLoRAConfig(ranks=(2,)))
    report = lk.adapt(model, lk.LoRAConfig(r=2))
    assert [(r.name, r.kind, r.shape) for r in report.replaced] == [("c_attn", "LoRALinear", (12, 8))]


def test_a_chain_restarts_over_conv1d():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 8))
    lk.adapt(model, lk.LoRAConfig(r=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    chain = lk.chain.cola(model, optimizer, 5)
    model[0].lora_B.weight.data.normal_()
    x = torch.randn(3, 8)
    y = model(x)
    chain.merge()
    assert not model[0].lora_B.weight.any()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_lora_ga_starts_over_conv1d():
    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(12, 8)), torch.randn(6, 8)
    config = lk.LoRAConfig(r=2)
    targets = lk.plan_adaptation(model, config).targets
    loss = lambda m, batch: m(batch).square().sum()  # noqa: E731
    gradients = lk.init.estimate_gradients(model, [x], loss, targets)
    assert gradients["0"].shape == (12, 8)
    y = model(x)
    report = lk.adapt(model, config)
    lk.init.lora_ga_(model, gradients)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    report.undo()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
