"""merge_and_unload: a plain model with the corrections in its weights, or a refusal that changes nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lowrank_kernels as lk

IDS = torch.arange(10)


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.up, self.down = nn.Linear(32, 48, bias=bias), nn.Linear(48, 32, bias=bias)
        self.head = nn.Linear(32, 11, bias=False)

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids)).relu()))


def make(**settings):
    torch.manual_seed(0)
    return Model(**settings)


def adapt(model, config):
    report = lk.adapt(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.2 * torch.randn(p.shape))
    return report


def put_in_by_hand(model):
    """One layer of each kind, none of them by adapt."""
    model.up = lk.nn.BlockSparseLinear.from_linear(model.up, torch.tensor([[0, 0], [2, 1]]), 16)
    model.down = lk.nn.DoRALinear.from_linear(model.down, 4)
    model.head = lk.nn.LoRALinear.from_linear(model.head, 4)
    with torch.no_grad():
        model.up.blocks.add_(0.1)
        model.down.lora_B.weight.normal_()
        model.head.lora_B.weight.normal_()


def plain(model):
    return {
        "modules": {name: (id(m), m.training) for name, m in model.named_modules()},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": set(vars(model)),
    }


CONFIGS = {
    "LoRA": lk.LoRAConfig(r=4),
    "LoRA with a bias of B's": lk.LoRAConfig(r=4, lora_bias=True, bias="all", exclude_modules=("head",)),
    "DoRA": lk.DoRAConfig(r=4),
    "many LoRAs": lk.MultiLoRAConfig(ranks=(2, 4)),
    "many DoRAs": lk.MultiLoRAConfig(ranks=(2, 4), dora=True),
}


def run(model, adapter):
    if adapter is None:
        return model(IDS)
    with lk.nn.use_adapters([adapter] * len(IDS)):
        return model(IDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plain_model_computes_what_the_adapted_one_did(name):
    model, adapter = make(), 1 if "many" in name else None
    before = plain(model)
    adapt(model, CONFIGS[name])
    want = run(model, adapter).detach()
    assert lk.merge_and_unload(model, adapter=adapter) is model
    assert plain(model) == before
    torch.testing.assert_close(model(IDS), want, rtol=2e-5, atol=2e-5)


def test_layers_put_in_by_hand_are_merged_as_well():
    model = make()
    modules = plain(model)["modules"]
    put_in_by_hand(model)
    want = model(IDS).detach()
    lk.merge_and_unload(model)
    assert plain(model)["modules"] == modules
    torch.testing.assert_close(model(IDS), want, rtol=2e-5, atol=2e-5)


def test_a_layer_that_is_merged_already_stays_as_it_is():
    model = make()
    adapt(model, lk.LoRAConfig(r=4))
    for layer in (model.up, model.down):
        layer.merge_()
    want, once = model(IDS).detach(), model.up.weight.detach().clone()
    lk.merge_and_unload(model)
    assert torch.equal(model.up.weight, once)
    torch.testing.assert_close(model(IDS), want, rtol=2e-5, atol=2e-5)


def test_a_chain_between_two_links_keeps_its_function():
    model = make()
    adapt(model, lk.LoRAConfig(r=4, train="b", exclude_modules=("head",)))
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.lora_B.weight.zero_()
            layer.lora_A.weight.zero_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    chain = lk.chain.rac_lora(model, optimizer, steps_per_link=2)
    for _ in range(3):
        model(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert chain.link == 1
    chain.detach()
    want = model(IDS).detach()
    lk.merge_and_unload(model)
    assert type(model.up) is nn.Linear
    torch.testing.assert_close(model(IDS), want, rtol=2e-5, atol=2e-5)


def test_one_layer_by_itself_becomes_its_linear():
    linear = nn.Linear(32, 48)
    layer = lk.nn.LoRALinear.from_linear(linear, 4)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    x = torch.randn(3, 32)
    want = layer(x).detach()
    assert lk.merge_and_unload(layer) is linear
    torch.testing.assert_close(linear(x), want, rtol=2e-5, atol=2e-5)


def test_a_layer_in_two_places_is_merged_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1] = model[0]
    adapt(model, lk.LoRAConfig(r=2))
    x = torch.randn(3, 8)
    want = model(x).detach()
    lk.merge_and_unload(model)
    assert model[0] is model[1] and type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want, rtol=2e-5, atol=2e-5)


def test_the_model_can_be_adapted_again_and_the_old_report_cannot_be_undone():
    model = make()
    config = lk.LoRAConfig(r=4, bias="all")
    report = adapt(model, config)
    lk.merge_and_unload(model)
    adapt(model, config)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"undo: expected .*still adapted.*merged and unloaded"):
        report.undo()
    report.undo()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


@dataclass(frozen=True, kw_only=True)
class MineConfig(lk.AdapterConfig):
    def rank_of(self, name):
        return 1

    def layer(self, name, linear):
        layer = nn.Module()
        layer.base_layer = linear
        return layer


def nan_in_the_last(model):
    adapt(model, lk.LoRAConfig(r=4))
    model.down.lora_B.weight.data[0, 0] = torch.nan


def infinite_magnitude(model):
    adapt(model, lk.DoRAConfig(r=4))
    model.down.lora_magnitude_vector.data[0] = torch.inf


def infinite_magnitude_of_one(model):
    adapt(model, lk.MultiLoRAConfig(ranks=(2, 4), dora=True))
    model.down.lora_magnitude.data[:, 0] = torch.inf


def nan_in_a_block(model):
    put_in_by_hand(model)
    model.up.blocks.data[0, 0, 0] = torch.nan


def nan_in_one_adapter(model):
    adapt(model, lk.MultiLoRAConfig(ranks=(2, 4)))
    model.down.lora_A.data[-1] = torch.nan


def tied_to_an_embedding(model):
    model.head.weight = model.embed.weight
    adapt(model, lk.LoRAConfig(r=4))


def tied_after_adapting(model):
    adapt(model, lk.LoRAConfig(r=4))
    model.embed.weight = model.head.base_layer.weight


def tied_bias(model):
    model.down.bias = nn.Parameter(torch.zeros(32))
    model.norm = nn.LayerNorm(32)
    model.norm.bias = model.down.bias
    adapt(model, lk.LoRAConfig(r=4, lora_bias=True, exclude_modules=("head",)))


def a_hook(model):
    adapt(model, lk.LoRAConfig(r=4))
    model.down.register_forward_hook(lambda *_: None)


def offloaded(model):
    adapt(model, lk.LoRAConfig(r=4))
    model.down.base_layer.to("meta")


REFUSED = {
    nan_in_the_last: (None, r"down: LoRALinear\.merge_: expected finite factors, and lora_B holds NaN"),
    infinite_magnitude: (None, r"down: .*finite column scale"),
    infinite_magnitude_of_one: (1, r"down: expected finite values, and the column scale m / n"),
    nan_in_a_block: (None, r"up: expected finite values, and blocks holds NaN"),
    nan_in_one_adapter: (1, r"down: expected finite values, and lora_A holds NaN"),
    tied_to_an_embedding: (
        None,
        r"head: expected weights of its own, but embed\.weight is also head\.base_layer\.weight",
    ),
    tied_after_adapting: (None, r"head: expected weights of its own, but embed\.weight is also head"),
    tied_bias: (None, r"down: expected weights of its own, but down\.base_layer\.bias is also norm\.bias"),
    a_hook: (None, r"down: it carries hooks"),
    offloaded: (None, r"down: its weight is on the meta device"),
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_be_merged_is_refused_before_anything_changes(spoil):
    adapter, message = REFUSED[spoil]
    model = make()
    spoil(model)
    before, weights = plain(model), copy.deepcopy({n: t for n, t in model.state_dict().items() if not t.is_meta})
    with pytest.raises(ValueError, match=message + r".*nothing has changed$"):
        lk.merge_and_unload(model, adapter=adapter)
    assert plain(model) == before
    state = model.state_dict()
    assert all(torch.equal(state[name].nan_to_num(), t.nan_to_num()) for name, t in weights.items())
    assert not any(layer.merged for layer in (model.up, model.down))


@pytest.mark.parametrize(
    ("config", "adapter", "message"),
    [
        (lk.LoRAConfig(r=4, lora_bias=True), None, r"head: .*expected a base layer with a bias"),
        (lk.MultiLoRAConfig(ranks=(2, 4)), None, r"up: expected adapter to name one of its 2 adapters, got None"),
        (lk.MultiLoRAConfig(ranks=(2, 4)), 2, r"up: expected adapter to name one of its 2 adapters, got 2"),
        (lk.MultiLoRAConfig(ranks=(2, 4)), True, r"up: expected adapter to name one of its 2 adapters, got True"),
        (MineConfig(), None, r"up: expected layers of this package, got a Module"),
    ],
)
def test_settings_that_do_not_merge_are_refused(config, adapter, message):
    model = make()
    lk.adapt(model, config)
    with pytest.raises(ValueError, match=message):
        lk.merge_and_unload(model, adapter=adapter)


def test_another_adapter_is_merged_than_the_one_asked_for():
    model = make()
    adapt(model, lk.MultiLoRAConfig(ranks=(2, 4)))
    model.down.merge_(0)
    with pytest.raises(ValueError, match=r"down: adapter 0 is merged; call unmerge_\(\) first"):
        lk.merge_and_unload(model, adapter=1)
    assert not model.up.merged


def test_a_model_without_layers_and_what_is_no_model_are_refused():
    with pytest.raises(ValueError, match="adapted layers, found none in this Model"):
        lk.merge_and_unload(make())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        lk.merge_and_unload("model")


# ----------------------------------------------------------------------------------------------------- computed weights


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(lambda base: prune.random_unstructured(base, "weight", 0.3), id="pruned"),
        pytest.param(torch.nn.utils.parametrizations.weight_norm, id="weight_norm"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda linear: lk.nn.LoRALinear(linear, 4),
        lambda linear: lk.nn.DoRALinear(linear, 4),
        lambda linear: lk.nn.MultiLoRALinear.from_linear(linear, [4]),
        lambda linear: lk.nn.BlockSparseLinear(linear, torch.tensor([[0, 0]]), 16),
    ],
    ids=["lora", "dora", "multi", "smt"],
)
def test_nothing_is_merged_into_a_weight_that_is_computed_from_others(make, compute):
    layer = make(nn.Linear(16, 16))
    compute(layer.base_layer)
    layer.base_layer.requires_grad_(False)
    before = {name: t.clone() for name, t in layer.base_layer.named_parameters()}
    with pytest.raises(ValueError, match="computed from other parameters"):
        layer.merge_()
    assert not layer.merged
    assert all(torch.equal(t, before[name]) for name, t in layer.base_layer.named_parameters())
