"""A factor for each rank: in every kind of layer, merged, in files, in a batch of many adapters."""

import json
import pickle

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.nn import (
    DoRAConv2d,
    DoRAEmbedding,
    DoRALinear,
    LoRAConv1d,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
)
from lowrank_kernels.optim import factor_groups

R = 4
GATE = torch.tensor([0.0, 1.5, -0.5, 2.0])


def _linear():
    return nn.Linear(12, 10), torch.randn(3, 5, 12)


def _patches():
    return nn.Conv2d(3, 8, 2, stride=2), torch.randn(2, 3, 6, 4)


def _conv():
    return nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 4)


def _conv1d():
    return nn.Conv1d(3, 8, 3), torch.randn(2, 3, 9)


def _embedding():
    return nn.Embedding(20, 8), torch.randint(20, (2, 5))


KINDS = {
    "linear": (LoRALinear, _linear),
    "linear, DoRA": (DoRALinear, _linear),
    "patches": (LoRAConv2d, _patches),
    "patches, DoRA": (DoRAConv2d, _patches),
    "convolution": (LoRAConv2d, _conv),
    "convolution, DoRA": (DoRAConv2d, _conv),
    "convolution, 1-D": (LoRAConv1d, _conv1d),
    "embedding": (LoRAEmbedding, _embedding),
    "embedding, DoRA": (DoRAEmbedding, _embedding),
}


def _up(layer):
    return layer.lora_embedding_B if isinstance(layer, LoRAEmbedding) else layer.lora_B.weight


def make(kind, **settings):
    """(a layer with a gate, one without whose B is B ∘ gate, x)"""
    torch.manual_seed(0)
    cls, build = KINDS[kind]
    base, x = build()
    gated, folded = cls(base, R, gate=True, **settings), cls(base, R, **settings)
    with torch.no_grad():
        for name, p, _ in gated.correction_parameters():
            if name != "lora_gate":
                p.normal_(std=0.5)
        gated.lora_gate.copy_(GATE)
    folded.load_state_dict({k: v for k, v in gated.state_dict().items() if k != "lora_gate"})
    with torch.no_grad():
        _up(folded).mul_(GATE.view(1, -1, *(1 for _ in _up(folded).shape[2:])))
    return gated, folded, x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_gate_is_a_factor_of_each_column_of_b(kind, hooked):
    gated, folded, x = make(kind)
    if hooked and not isinstance(gated, LoRAEmbedding):
        for layer in (gated, folded):
            layer.lora_A.register_forward_hook(lambda *_: None)
    y, expected = gated(x), folded(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    of_folded = {name: p.grad for name, p, _ in folded.correction_parameters()}
    for name, p, _ in gated.correction_parameters():
        if name in ("lora_B", "lora_embedding_B"):
            size = [1, -1] + [1] * (p.dim() - 2)
            others = [d for d in range(p.dim()) if d != 1]
            torch.testing.assert_close(p.grad, of_folded[name] * GATE.view(size), rtol=1e-4, atol=1e-4)
            of_gate = (of_folded[name] * p.detach()).sum(others)
            torch.testing.assert_close(gated.lora_gate.grad, of_gate, rtol=1e-4, atol=1e-4)
        elif name != "lora_gate":
            torch.testing.assert_close(p.grad, of_folded[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_takes_the_gate(kind):
    gated, _, x = make(kind)
    gated.eval()
    with torch.no_grad():
        y, weight = gated(x), gated.base_layer.weight.clone()
        torch.testing.assert_close(gated.merge_()(x), y, rtol=1e-4, atol=1e-4)
        gated.lora_gate.zero_()  # what was merged is what is taken out
        gated.unmerge_()
    torch.testing.assert_close(gated.base_layer.weight, weight, rtol=1e-5, atol=1e-6)


def test_a_gate_that_is_not_finite_is_not_merged():
    gated, _, _ = make("linear")
    weight = gated.weight.clone()
    with torch.no_grad():
        gated.lora_gate[1] = float("nan")
    with pytest.raises(ValueError, match="lora_gate holds NaN or Inf"):
        gated.merge_()
    assert torch.equal(gated.weight, weight)


def test_a_layer_without_a_gate_has_no_such_parameter():
    layer = LoRALinear(nn.Linear(12, 10), R)
    assert layer.lora_gate is None and "lora_gate" not in layer.state_dict()


def test_a_gate_starts_at_one_and_survives_pickle():
    layer = LoRALinear(nn.Linear(12, 10), R, gate=True)
    assert torch.equal(layer.lora_gate, torch.ones(R)) and layer.lora_gate.requires_grad
    assert torch.equal(pickle.loads(pickle.dumps(layer)).lora_gate, torch.ones(R))


def test_gates_compile():
    gated, _, x = make("linear, DoRA")
    torch.testing.assert_close(torch.compile(gated, fullgraph=True, backend="eager")(x), gated(x))


def test_over_few_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    lk.quantize_(model, "nf4")
    lk.adapt(model, lk.LoRAConfig(r=R, gate=True))
    layer = model[0]
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.lora_gate.copy_(GATE)
    x = torch.randn(3, 64)
    dense = layer.matrix.dense() + layer.scaling * (layer.lora_B.weight * GATE) @ layer.lora_A.weight
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias, rtol=1e-4, atol=1e-4)


def _model(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 10), nn.Linear(10, 6))
    if settings:
        kind = lk.DoRAConfig if settings.pop("dora", False) else lk.LoRAConfig
        lk.adapt(model, kind(r=R, target_modules=["0", "1", "2"], gate=True, **settings))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".lora_" in name:
                    p.normal_() if "gate" not in name else p.copy_(GATE)
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_has_the_gate_in_b_which_peft_reads(tmp_path, dora):
    peft = pytest.importorskip("peft")
    model, ids = _model(dora=dora, alpha=3.0).eval(), torch.randint(20, (2, 3))
    lk.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(_model(), tmp_path).eval()
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-4, atol=1e-4)
    ours = _model()
    lk.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert ours[1].lora_gate is None


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_with_gates_goes_on_and_peft_refuses_it(tmp_path, dora):
    model = _model(dora=dora, alpha=3.0)
    lk.save_adapter(model, tmp_path, fold_gate=False)
    ours = _model()
    lk.load_adapter(ours, tmp_path, trainable=True)
    assert all(torch.equal(p, ours.get_parameter(name)) for name, p in model.named_parameters())
    assert ours[1].lora_gate.requires_grad
    peft = pytest.importorskip("peft")
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(_model(), tmp_path)


def test_a_file_that_lacks_a_gate_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    lk.save_adapter(_model(alpha=3.0), tmp_path, fold_gate=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "1.lora_gate" not in k}, path)
    with pytest.raises(ValueError, match="lora_gate"):
        lk.load_adapter(_model(), tmp_path)
    save_file(tensors, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="lora_gate"):
        lk.load_adapter(_model(), tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_a_stack_takes_gated_layers(dora):
    gated, _, x = make("linear, DoRA" if dora else "linear")
    own = (*gated.factors(), gated.scaling, *((gated.magnitude,) if dora else ()))
    stack = lk.LoRAStack.from_factors([own])
    ids = torch.zeros(x.shape[:-1], dtype=torch.int32)
    y = lk.multi_lora_linear(x, gated.weight, stack, ids, gated.bias)
    torch.testing.assert_close(y, gated(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fold_gate", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_a_bank_serves_gated_adapters(tmp_path, dora, fold_gate):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6))

    model = plain()
    lk.adapt(model, (lk.DoRAConfig if dora else lk.LoRAConfig)(r=R, gate=True))
    with torch.no_grad():
        for layer in model:
            layer.lora_B.weight.normal_()
            layer.lora_gate.copy_(GATE)
    lk.save_adapter(model, tmp_path, fold_gate=fold_gate)
    bank = lk.serving.AdapterBank(plain())
    bank.load("a", tmp_path)
    x = torch.randn(2, 12)
    with torch.no_grad(), bank.batch(["a", None]):
        y = bank.model(x)
    torch.testing.assert_close(y, torch.stack([model(x)[0], plain()(x)[1]]), rtol=1e-4, atol=1e-4)


def test_optimizers_of_pairs_refuse_gates_that_train():
    model = _model(alpha=3.0)
    with pytest.raises(ValueError, match=r"0\.lora_gate, which trains"):
        factor_groups(model)
    for module in model:
        module.lora_gate.requires_grad_(False)
    assert factor_groups(model)


@pytest.mark.parametrize("config", [lk.LoRAConfig, lk.DoRAConfig])
def test_a_gate_is_a_flag(config):
    with pytest.raises(TypeError, match="gate to be True or False"):
        config(gate=2)
    with pytest.raises(TypeError, match="gate"):
        LoRALinear(nn.Linear(12, 10), R, gate=torch.ones(R))
