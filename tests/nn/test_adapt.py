"""adapt: what is replaced, what is not and why, and that a failure changes nothing."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lowrank_kernels import load_adapter, save_adapter
from lowrank_kernels.adapt import adapt, config_of, plan_adaptation
from lowrank_kernels.config import AdapterConfig, DoRAConfig, LoRAConfig, MultiLoRAConfig
from lowrank_kernels.nn import LoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.mlp(self.q_proj(x) * self.v_proj(x).repeat(1, 2)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def get_output_embeddings(self):
        return self.head


IDS = torch.arange(10)


def snapshot(model):
    """All that undoing, or failing, must leave alone."""
    return (
        [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters(remove_duplicate=False)],
        {n: t.clone() for n, t in model.state_dict().items()},
        set(model.__dict__),
    )


def assert_same(model, before):
    modules, parameters, state, attributes = snapshot(model)
    assert modules == before[0] and attributes == before[3]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    assert state.keys() == before[2].keys() and all(torch.equal(state[n], t) for n, t in before[2].items())


def names(report):
    return [r.name for r in report.replaced]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ["layers.0.q_proj", "layers.1.q_proj"]),
        (["layers.1.q_proj"], ["layers.1.q_proj"]),
        ({"mlp.0", "v_proj"}, ["layers.0.v_proj", "layers.0.mlp.0", "layers.1.v_proj", "layers.1.mlp.0"]),
        (r"layers\.0\..*_proj", ["layers.0.q_proj", "layers.0.v_proj"]),
        (("head",), ["head"]),
    ],
)
def test_targets(targets, expected):
    model = Model()
    y = model(IDS)
    report = adapt(model, LoRAConfig(r=2, target_modules=targets))
    assert names(report) == expected
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == expected
    torch.testing.assert_close(model(IDS), y, rtol=5e-6, atol=5e-6)


def test_all_linear_leaves_the_head_and_says_so():
    model = Model()
    report = adapt(model, LoRAConfig(r=2))
    assert len(report.replaced) == 8
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("head", "the output head; name it in target_modules to adapt it")
    ]


def adapted_with_much_skipped():
    """(report, parameters of the model before)."""
    model = Model()
    total = sum(p.numel() for p in model.parameters())
    config = LoRAConfig(r=2, target_modules=("q_proj", "norm", "nope"), exclude_modules=("layers.0.q_proj",))
    return adapt(model, config), total


def test_the_report_names_shape_and_rank_of_what_is_replaced():
    report, _ = adapted_with_much_skipped()
    (only,) = report.replaced
    assert (only.name, only.kind, only.shape, only.rank) == ("layers.1.q_proj", "LoRALinear", (8, 8), 2)


def test_the_report_counts_parameters():
    report, total = adapted_with_much_skipped()
    assert (report.trainable, report.total) == (2 * 8 * 2, total + 2 * 8 * 2)


def test_the_report_says_of_every_other_linear_why_it_is_not_replaced():
    report, _ = adapted_with_much_skipped()
    assert {s.name: s.reason for s in report.skipped} == {
        "layers.0.q_proj": "in exclude_modules",
        "layers.0.norm": "not an nn.Linear but a LayerNorm",
        "layers.1.norm": "not an nn.Linear but a LayerNorm",
        "target_modules['nope']": "matches no module",
        **{f"layers.{i}.{n}": "not in target_modules" for i in (0, 1) for n in ("v_proj", "mlp.0", "mlp.2")},
        "head": "not in target_modules",
    }


def test_the_report_as_text_takes_like_lines_together():
    text = str(adapted_with_much_skipped()[0])
    assert "LoRAConfig: 1 replaced, 11 skipped; 32 of" in text
    assert "+ layers.1.q_proj: LoRALinear 8×8, rank 2" in text
    assert "- layers.*.mlp.* (×4): not in target_modules" in text


def test_patterns_choose_rank_and_alpha_and_unused_ones_are_reported():
    model = Model()
    config = LoRAConfig(
        r=2,
        alpha=4,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={r"layers\.1\..*": 3, "v_proj": 1, "k_proj": 9},
        alpha_pattern={"^layers.0.q_proj": 8, "layers.9.q_proj": 1},
    )
    report = adapt(model, config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert {n: (m.r, m.alpha) for n, m in layers.items()} == {
        "layers.0.q_proj": (2, 8),
        "layers.0.v_proj": (1, 4),
        "layers.1.q_proj": (3, 4),
        "layers.1.v_proj": (3, 4),
    }
    unused = [s.name for s in report.skipped if s.reason == "matches no replaced module"]
    assert unused == ["rank_pattern['k_proj']", "alpha_pattern['layers.9.q_proj']"]


def test_settings_reach_the_layers():
    model = Model().eval()
    config = LoRAConfig(
        r=4, alpha=6, dropout=0.25, rslora=True, lora_bias=True, init="gaussian", train="b", dtype=torch.float64
    )
    adapt(model, config)
    layer = model.layers[0].q_proj
    assert (layer.scaling, layer.dropout, layer.training) == (3.0, 0.25, False)
    assert layer.lora_A.weight.dtype == torch.float64 and layer.lora_B.bias is not None
    assert not layer.lora_A.weight.requires_grad and layer.lora_B.weight.requires_grad


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_bias_modes(bias):
    model = Model()
    adapt(model, LoRAConfig(r=2, target_modules=("q_proj", "v_proj"), bias=bias))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {f"layers.{i}.{n}.lora_{f}.weight" for i in (0, 1) for n in ("q_proj", "v_proj") for f in "AB"}
    own = {f"layers.{i}.q_proj.base_layer.bias" for i in (0, 1)}
    others = {f"layers.{i}.{n}.bias" for i in (0, 1) for n in ("mlp.0", "mlp.2", "norm")}
    assert trained == factors | {"none": set(), "lora_only": own, "all": own | others}[bias]
    model(IDS).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("bias", ["none", "all"])
def test_undo_puts_everything_back(bias):
    model = Model()
    model.embed.weight.requires_grad_(False)
    before = snapshot(model)
    report = adapt(model, LoRAConfig(r=2, bias=bias, lora_bias=True, exclude_modules=("v_proj",)))
    assert config_of(model).bias == bias
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)
    report.undo()
    report.undo()
    assert_same(model, before)


def test_undo_puts_back_what_a_state_was_assigned_to():
    model = Model()
    state, trains = model.state_dict(), [p.requires_grad for p in model.parameters()]
    before = {n: t.clone() for n, t in state.items()}
    report = adapt(model, LoRAConfig(r=2, bias="all"))
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()}, assign=True)
    report.undo()
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n.endswith(".bias"))


def test_undo_unmerges():
    model = Model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = adapt(model, LoRAConfig(r=2, bias="all"))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.weight.data.normal_()
            layer.merge_()
    report.undo()
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- what cannot be replaced


def test_each_kind_of_module_that_cannot_be_replaced_has_its_reason():
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

    class Conv1D(nn.Module):
        pass

    class QuantLinear(nn.Module):
        pass

    hooked = nn.Linear(4, 4)
    hooked.forward = hooked.forward
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "quantised": quantised,
            "gptq": QuantLinear(),
            "conv1d": Conv1D(),
            "done": LoRALinear.from_linear(nn.Linear(4, 4), 2),
            "attention": nn.MultiheadAttention(4, 2),
            "encoder": nn.TransformerEncoderLayer(4, 2, 8),
            "hooked": hooked,
        }
    )
    report = adapt(model, LoRAConfig(r=2))
    assert names(report) == ["plain"]
    reasons = {s.name: s.reason for s in report.skipped}
    for name, words in {
        "quantised": "quantised (Linear, weight of torch.int8)",
        "gptq": "not an nn.Linear but a QuantLinear",
        "conv1d": "Conv1D keeps its weight as (in, out)",
        "done": "already adapted (LoRALinear)",
        "attention.out_proj": "nn.MultiheadAttention, reads its weight",
        "encoder.self_attn.out_proj": "nn.MultiheadAttention, reads its weight",
        "encoder.linear1": "nn.TransformerEncoderLayer, reads its weight",
        "encoder.linear2": "nn.TransformerEncoderLayer, reads its weight",
        "hooked": "hooks or a replaced forward",
    }.items():
        assert words in reasons.pop(name), name
    assert not reasons


@pytest.mark.parametrize("config", [LoRAConfig(r=2), DoRAConfig(r=2), MultiLoRAConfig(ranks=(2,))])
def test_partitioned_weights_are_refused_and_nothing_changes(config):
    model = Model()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = torch.empty(0)  # as DeepSpeed's ZeRO-3 does at construction
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"shape \(0,\), not \(8, 8\): it is partitioned \(DeepSpeed ZeRO-3\)"):
        adapt(model, config)
    assert_same(model, before)
    with pytest.raises(TypeError, match="partitioned"):
        LoRALinear.from_linear(model.head, 2)


def test_layers_adapted_by_hand_keep_training():
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(4, 4), 2), nn.Linear(4, 4), nn.Linear(4, 4))
    adapt(model, LoRAConfig(r=2, target_modules=("1",)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.lora_{f}.weight" for i in (0, 1) for f in "AB"}


def test_nothing_to_replace_is_an_error_that_names_the_linears():
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        adapt(model, LoRAConfig(target_modules=("c_attn", "norm")))
    for words in ("('c_attn', 'norm') replaces nothing", "layers.*.q_proj", "head", "layers.*.norm (not an nn.Linear"):
        assert words in str(error.value)
    assert_same(model, before)
    with pytest.raises(ValueError, match="its linears: none"):
        adapt(nn.Linear(4, 4), LoRAConfig())


@dataclass(frozen=True, kw_only=True)
class FailsAtTheThird(AdapterConfig):
    """A method of a user's own, and one that breaks half-way."""

    def rank_of(self, name):
        return 1

    def layer(self, name, linear):
        if name.endswith("mlp.0"):
            raise RuntimeError("out of memory")
        return LoRALinear.from_linear(linear, 1)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_failure_leaves_the_model_as_it_was(bias):
    model = Model()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapt(model, FailsAtTheThird(bias=bias))
    assert_same(model, before)
    report = adapt(model, FailsAtTheThird(target_modules=("q_proj",)))
    assert names(report) == ["layers.0.q_proj", "layers.1.q_proj"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoRAConfig(r=5, target_modules=("q_proj", "v_proj")),
            r"adapt: expected a rank of at most min\(N, K\) = 4 for layers.0.v_proj of shape \(N, K\) = \(4, 8\), got 5"
            r"; lower r, or give it a rank of its own in rank_pattern",
        ),
        (DoRAConfig(r=9, target_modules=("q_proj",)), r"= 8 for layers.0.q_proj of shape \(N, K\) = \(8, 8\), got 9"),
        (LoRAConfig(r=4, rank_pattern={r"layers\.1\.v_proj": 6}), r"= 4 for layers.1.v_proj .*, got 6"),
        (
            LoRAConfig(r=5, train="b", init="orthonormal", target_modules=r".*_proj"),
            "= 4 for layers.0.v_proj .*, got 5",
        ),
        (MultiLoRAConfig(ranks=(2, 5)), "= 4 for layers.0.v_proj .*, got 5; lower ranks, or .* exclude_modules"),
    ],
)
@pytest.mark.parametrize("function", [adapt, plan_adaptation])
def test_a_rank_over_the_matrix_size_is_refused(function, config, message):
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        function(model, config)
    assert_same(model, before)


def test_the_rank_of_the_matrix_is_the_largest():
    model = Model()
    report = adapt(model, LoRAConfig(r=8, rank_pattern={"v_proj": 4}))
    assert {r.shape: r.rank for r in report.replaced} == {(8, 8): 8, (4, 8): 4, (16, 8): 8, (8, 16): 8}
    several = adapt(Model(), MultiLoRAConfig(ranks=(4, 4, 3), target_modules=("v_proj",)))
    assert {r.rank for r in several.replaced} == {11}  # of each adapter, not of all together


def test_an_adapted_model_is_not_adapted_twice():
    model = Model()
    report = adapt(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    with pytest.raises(ValueError, match="adapted already; call undo"):
        adapt(model, LoRAConfig(r=2, target_modules=("v_proj",)))
    report.undo()
    assert names(adapt(model, LoRAConfig(r=2, target_modules=("head",)))) == ["head"]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"target_modules": ()}, ValueError, "target_modules to name something"),
        ({"target_modules": ""}, ValueError, "target_modules to name something"),
        ({"target_modules": 3}, TypeError, "target_modules to be names"),
        ({"target_modules": ("a", 1)}, TypeError, "target_modules to be names"),
        ({"target_modules": "(a"}, ValueError, "regular expression"),
        ({"exclude_modules": "*a"}, ValueError, "regular expression"),
        ({"bias": "some"}, ValueError, "bias to be one of none, all, lora_only"),
        ({"r": 0}, ValueError, "r to be an integer"),
        ({"alpha": float("nan")}, ValueError, "alpha to be a finite"),
        ({"alpha": "16"}, ValueError, "alpha to be a finite"),
        ({"dropout": -0.1}, ValueError, "0 <= dropout < 1"),
        ({"rank_pattern": {"a": 0}}, ValueError, "r to be an integer"),
        ({"rank_pattern": {"(": 2}}, ValueError, "regular expression"),
        ({"rank_pattern": [3]}, TypeError, "rank_pattern to be a dict"),
        ({"alpha_pattern": {1: 2}}, TypeError, "keys of alpha_pattern"),
        ({"alpha_pattern": {"a": None}}, ValueError, "alpha to be a finite"),
        ({"rslora": 1}, TypeError, "rslora to be True or False"),
        ({"init": "pissa"}, ValueError, "init to be one of"),
        ({"train": "none"}, ValueError, "train to be one of"),
        ({"dtype": "float32"}, TypeError, "floating dtype"),
    ],
)
def test_wrong_configs_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        LoRAConfig(**settings)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got str"):
        adapt("model", LoRAConfig())
    with pytest.raises(TypeError, match="AdapterConfig such as LoRAConfig, got dict"):
        adapt(Model(), {"r": 8})


# ------------------------------------------------------------------------------------------------------------- sharing


def test_a_module_used_twice_is_replaced_in_both_places():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    before = snapshot(model)
    report = adapt(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    assert names(report) == ["layers.0.q_proj"]
    assert model.layers[0].q_proj is model.layers[1].q_proj and isinstance(model.layers[1].q_proj, LoRALinear)
    report.undo()
    assert_same(model, before)


def test_a_tied_weight_stays_tied_and_is_not_merged():
    model = Model()
    model.head.weight = model.embed.weight
    adapt(model, LoRAConfig(r=2, target_modules=("head",)))
    assert model.head.weight is model.embed.weight
    weight = model.embed.weight.detach().clone()
    with pytest.raises(ValueError, match=r"also that of embed\.weight"):
        model.head.merge_()
    assert torch.equal(model.embed.weight, weight)


def test_copies_of_an_adapted_model_know_their_config():
    model = Model()
    adapt(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    assert config_of(copy.deepcopy(model)) == config_of(model) != LoRAConfig()
    assert config_of(Model()) is None


def test_parameters_of_experts_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 6, 8))
            self.position = nn.Parameter(torch.zeros(1, 6, 8))

    model = nn.ModuleDict({"q": nn.Linear(8, 8), "experts": Experts(), "conv": nn.Conv1d(8, 8, 3)})
    report = adapt(model, LoRAConfig(r=2))
    assert [(s.name, "experts" in s.reason) for s in report.skipped] == [("experts.gate_up", True)]


class Uneven(nn.Module):
    """Linears of which names alone tell some apart, and one that is too small for a rank of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({"proj": nn.Linear(16, 16), "gate": nn.Linear(16, 2)})
        self.other = nn.ModuleDict({"proj": nn.LayerNorm(16), "gate": nn.Linear(16, 16)})

    def forward(self, x):
        x = self.other["proj"](self.trunk["proj"](x))
        return self.trunk["gate"](x), self.other["gate"](x)


@pytest.mark.parametrize("kind", [LoRAConfig, DoRAConfig])
def test_all_linear_lowers_a_rank_that_does_not_fit_and_says_so(kind, tmp_path):
    model = Uneven()
    report = adapt(model, kind())
    assert {r.name: r.rank for r in report.replaced} == {"trunk.proj": 8, "trunk.gate": 2, "other.gate": 8}
    assert report.notes == ("rank 8 of trunk.gate was lowered to 2, the smaller side of its weight",)
    assert "note: rank 8 of trunk.gate was lowered to 2" in str(report)
    save_adapter(model, tmp_path)
    assert {r.name: r.rank for r in load_adapter(Uneven(), tmp_path).replaced} == {
        r.name: r.rank for r in report.replaced
    }


def test_a_rank_that_does_not_fit_a_named_linear_is_refused():
    with pytest.raises(ValueError, match=r"rank of at most min\(N, K\) = 2 for trunk.gate"):
        adapt(Uneven(), LoRAConfig(target_modules=["gate"]))


def test_all_linear_is_written_as_the_names_that_it_meant(tmp_path):
    model = Uneven()
    adapt(model, LoRAConfig(exclude_modules=["other.gate"]))
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    # Not "proj" and "gate", which a LayerNorm and another linear are called, too.
    assert written["target_modules"] == ["trunk.gate", "trunk.proj"]
    assert written["exclude_modules"] is None


def test_undo_after_a_cast_puts_back_what_trained_whole_in_that_dtype():
    model = Uneven()
    report = adapt(model, LoRAConfig(target_modules=["trunk.proj"], modules_to_save=["other.gate"]))
    model.to(torch.bfloat16)
    report.undo()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(torch.randn(2, 16, dtype=torch.bfloat16))


def test_adapting_the_rest_of_a_model_keeps_what_trains_in_an_adapted_part():
    model = Uneven()
    adapt(model.trunk, LoRAConfig(target_modules=["proj"], modules_to_save=["gate"], bias="all"))
    trained = {n for n, p in model.trunk.named_parameters() if p.requires_grad}
    adapt(model, LoRAConfig(target_modules=["other.gate"]))
    assert {n for n, p in model.trunk.named_parameters() if p.requires_grad} == trained


def test_a_config_that_does_not_name_a_layer_is_not_written(tmp_path):
    model = Uneven()
    model.trunk["proj"] = LoRALinear(model.trunk["proj"], 4, alpha=16)
    with pytest.raises(ValueError, match=r"expected target_modules of the config to name trunk\.proj"):
        save_adapter(model, tmp_path, config=LoRAConfig(r=4, target_modules=["gate"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("targets", ["all-linear", ("0", "1", "2")])
def test_lazy_modules_are_skipped_by_name(targets, tmp_path):
    def lazy():
        return nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4), nn.LazyConv1d(4, 3))

    model = lazy()
    report = adapt(model, LoRAConfig(r=2, target_modules=targets))
    assert [r.name for r in report.replaced] == ["0"]
    assert "1: a LazyLinear has no weight before its first call; run the model once" in str(report)
    save_adapter(model, tmp_path, config=LoRAConfig(r=2, target_modules=("0",)))
    other = lazy()
    load_adapter(other, tmp_path).undo()
    assert type(other[0]) is nn.Linear
    model[1](model[0](torch.ones(1, 8)))
    assert not model[1].weight.requires_grad and model[0].lora_A.weight.requires_grad
    report.undo()
    assert model[1].weight.requires_grad
