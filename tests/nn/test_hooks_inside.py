"""A layer calls its submodules where something is attached to them, and computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import lowrank_kernels as lk
from lowrank_kernels.nn import DoRALinear, LoRALinear

INSIDE = ("base_layer", "lora_A", "lora_B")
LAYERS = {
    "LoRA": (LoRALinear, {}),
    "LoRA with a bias of B's": (LoRALinear, {"lora_bias": True}),
    "rsLoRA": (LoRALinear, {"rslora": True}),
    "DoRA": (DoRALinear, {}),
    "DoRA with a trained norm": (DoRALinear, {"detach_norm": False}),
}


def make(name, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    kind, own = LAYERS[name]
    layer = kind(nn.Linear(24, 16, dtype=dtype), 4, **own, **settings)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        if layer.lora_B.bias is not None:
            layer.lora_B.bias.normal_()
        if isinstance(layer, DoRALinear):
            layer.lora_magnitude_vector.add_(torch.rand(16))
    return layer


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def assert_same(layer, twin, dtype=torch.float32):
    x = torch.randn(2, 3, 24, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for actual, expected in zip(gradients(twin, x), gradients(layer, x), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_on_all_three_run_and_change_no_number(name, dtype):
    layer = make(name, dtype)
    twin, seen = copy.deepcopy(layer), []
    for inside in INSIDE:
        getattr(twin, inside).register_forward_hook(lambda *_, inside=inside: seen.append(inside))
    assert_same(layer, twin, dtype)
    assert seen == list(INSIDE)


def attach_forward(module, called):
    module.register_forward_hook(lambda *_: called.append(1))


def attach_before(module, called):
    module.register_forward_pre_hook(lambda *_: called.append(1))


def attach_backward(module, called):
    module.register_full_backward_hook(lambda *_: called.append(1))


def attach_before_backward(module, called):
    module.register_full_backward_pre_hook(lambda *_: called.append(1))


def replace_forward(module, called):
    own = module.forward
    module.forward = lambda x: called.append(1) or own(x)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize(
    "attach", [attach_forward, attach_before, attach_backward, attach_before_backward, replace_forward]
)
@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_each_kind_of_hook_on_each_submodule_runs(name, attach, inside):
    layer = make(name)
    twin, called = copy.deepcopy(layer), []
    attach(getattr(twin, inside), called)
    assert_same(layer, twin)
    assert called == [1]


@pytest.mark.parametrize("inside", INSIDE)
def test_a_submodule_that_is_wrapped_is_called(inside):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inner, self.called = module, 0

        @property
        def weight(self):
            return self.inner.weight

        @property
        def bias(self):
            return self.inner.bias

        in_features = property(lambda self: self.inner.in_features)
        out_features = property(lambda self: self.inner.out_features)

        def forward(self, x):
            self.called += 1
            return self.inner(x)

    layer = make("LoRA")
    twin = copy.deepcopy(layer)
    wrapper = Wrapper(getattr(twin, inside))
    setattr(twin, inside, wrapper)
    assert_same(layer, twin)
    assert wrapper.called == 1


@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_hooks_for_all_modules_see_those_inside(name):
    layer, seen = make(name), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(3, 24))
    finally:
        handle.remove()
    assert seen == [*(getattr(layer, inside) for inside in INSIDE), layer]
    layer(torch.randn(3, 24))
    assert len(seen) == 4


def test_what_a_hook_returns_counts():
    layer = make("LoRA").eval()
    x = torch.randn(3, 24)
    y = layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(layer(x), y + 1, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_decides_the_dtype_as_without_hooks(name):
    layer = make(name)
    twin = copy.deepcopy(layer)
    called = []
    attach_forward(twin.lora_A, called)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, same = layer(x), twin(x)
    assert called == [1]
    assert same.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(same, y, rtol=3e-2, atol=3e-2 * y.abs().max().item())


@pytest.mark.parametrize("dropout_base", [False, True])
def test_dropout_has_the_mean_of_no_dropout(dropout_base):
    """Of a DoRA layer as of a LoRA layer: what is dropped is the correction's input, and with it the base's."""
    settings = {"dropout_base": dropout_base}
    x = torch.randn(1, 24).expand(20000, 24)
    for name, own in (("LoRA", {}), ("DoRA", settings)):
        layer = make(name, dropout=0.5, **own)
        y = copy.deepcopy(layer).eval()(x[:1])[0]
        called = []
        attach_forward(layer.lora_A, called)
        with torch.no_grad():
            mean = layer(x).mean(0)
        assert called == [1]
        torch.testing.assert_close(mean, y, rtol=0, atol=0.03 * y.abs().max().item())


def test_evaluation_drops_nothing_where_hooks_are():
    layer = make("DoRA", dropout=0.5, dropout_base=True).eval()
    twin, called = copy.deepcopy(layer), []
    attach_forward(twin.base_layer, called)
    assert_same(layer, twin)
    assert called == [1]


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_weight_that_is_a_view_of_what_trains_is_called_too(name):
    """FSDP1 gives a layer views of one flat parameter, which all seem to train."""
    layer = make(name)
    twin = copy.deepcopy(layer)
    flat = nn.Parameter(twin.base_layer.weight.detach().clone().flatten())
    del twin.base_layer._parameters["weight"]
    twin.base_layer.weight = flat.view(16, 24)
    assert_same(layer, twin)


def test_offloaded_modules_run_and_refuse_what_needs_their_weights(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(make("LoRA"), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(3, 24)
    with torch.no_grad():
        want = model(x)
        accelerate.cpu_offload(model, execution_device="cpu")
        torch.testing.assert_close(model(x), want, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match=r"LoRALinear\.merge_: .*meta device.*load it first"):
        model[0].merge_()
    with pytest.raises(ValueError, match="on the meta device"):
        lk.save_adapter(model, tmp_path, config=lk.LoRAConfig(r=4))
    assert not list(tmp_path.iterdir())


def test_a_dora_layer_refuses_modules_that_are_offloaded_by_themselves():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(make("DoRA"))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"DoRALinear: .*whole weight of base_layer.*offload the layer as a whole"):
        model(torch.randn(3, 24))


@pytest.mark.parametrize("kind", ["LoRALinear", "DoRALinear", "MultiLoRALinear", "BlockSparseLinear"])
def test_layers_that_are_offloaded_as_a_whole_run(kind):
    accelerate = pytest.importorskip("accelerate")
    linear = nn.Linear(32, 32)
    model = nn.Sequential(
        lk.nn.MultiLoRALinear.from_linear(linear, [2, 3])
        if kind == "MultiLoRALinear"
        else lk.nn.BlockSparseLinear.from_linear(linear, torch.tensor([[0, 1]]), 16)
        if kind == "BlockSparseLinear"
        else getattr(lk.nn, kind).from_linear(linear, 4)
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 32)
    with lk.nn.use_adapters([0, 1]), torch.no_grad():
        want = model(x)
        accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=[kind])
        for _ in range(2):
            torch.testing.assert_close(model(x), want)


def test_a_compiled_layer_with_hooks_runs_them():
    layer = make("LoRA")
    twin = copy.deepcopy(layer)
    twin.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(3, 24)
    compiled = torch.compile(twin, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x) + 1, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda linear: lk.nn.BlockSparseLinear.from_linear(linear, torch.tensor([[0, 0]]), 16),
        lambda linear: lk.nn.MultiLoRALinear.from_linear(linear, (2, 3)),
    ],
    ids=["blocks", "many"],
)
def test_a_layer_that_cannot_call_its_base_refuses_hooks_on_it_and_runs_its_own(make):
    layer, called = make(nn.Linear(24, 16)), []
    layer.register_forward_hook(lambda *_: called.append(1))
    given = (torch.zeros(3, dtype=torch.int64),) if isinstance(layer, lk.nn.MultiLoRALinear) else ()
    layer(torch.randn(3, 24), *given)
    assert called == [1]
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"^{type(layer).__name__}: expected a base_layer without hooks"):
        layer(torch.randn(3, 24), *given)
    handle.remove()
    layer(torch.randn(3, 24), *given)
