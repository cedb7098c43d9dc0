"""Adapters on disk: what we write PEFT reads, what PEFT writes we read, and nothing else gets in."""

import copy
import json
import os
import pickle
import struct
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lowrank_kernels import load_adapter, save_adapter
from lowrank_kernels.adapt import adapt, config_of
from lowrank_kernels.adapters import load
from lowrank_kernels.adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from lowrank_kernels.config import DoRAConfig, LoRAConfig, MultiLoRAConfig
from lowrank_kernels.integrations.peft import accelerate
from lowrank_kernels.names import named_buffers
from lowrank_kernels.nn import DoRALinear, LoRALinear
from lowrank_kernels.serving import AdapterBank


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def assert_close(got, expected):
    """To 2e-6 of the largest logit: float32 sums in another order differ by their scale."""
    assert (got - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max().item())


def exact_logits(model, tokens):
    """Of the model in float64, where two models that are the same agree whatever the order of their sums."""
    return copy.deepcopy(model).double()(tokens).logits


def assert_the_same_model(model, other, tokens):
    got, expected = exact_logits(model, tokens), exact_logits(other, tokens)
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


SETTINGS = [
    {"target_modules": ("q_proj", "v_proj"), "r": 4, "alpha": 6},
    {"target_modules": "all-linear", "r": 2},
    {"target_modules": r".*\.1\..*_proj", "r": 3, "exclude_modules": ("k_proj",)},
    {"target_modules": ("q_proj", "lm_head"), "r": 4, "alpha": 3.5, "rslora": True, "dropout": 0.25},
    {
        "target_modules": ("q_proj", "down_proj"),
        "rank_pattern": {"down_proj": 5, r"layers\.0\.self_attn\..*": 2},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 1.5},
        "rslora": True,
    },
    {"target_modules": ("q_proj", "up_proj"), "bias": "lora_only", "r": 2},
    {"target_modules": ("q_proj", "up_proj"), "bias": "all", "r": 2},
    {"target_modules": ("q_proj", "k_proj"), "lora_bias": True, "bias": "all", "r": 2},
    {"target_modules": ("q_proj", "v_proj"), "use_dora": True, "r": 4, "alpha": 6, "dropout": 0.25},
    {
        "target_modules": "all-linear",
        "use_dora": True,
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"q_proj": 1.5},
        "rslora": True,
        "bias": "lora_only",
    },
]
PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}


def our_config(settings):
    settings = dict(settings)
    return (DoRAConfig if settings.pop("use_dora", False) else LoRAConfig)(**settings)


def peft_config(settings):
    translated = {PEFT_NAMES.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return peft.LoraConfig(**{"lora_alpha": 16, "r": 8, **translated})


@pytest.fixture(params=SETTINGS, ids=str)
def settings(request):
    return request.param


@pytest.fixture
def saved(llama, settings, tmp_path):
    """(a model with a random adapter of these settings, the folder it was saved to)."""
    model = llama()
    adapt(model, our_config(settings))
    randomise(model)
    folder = save_adapter(model, tmp_path / "a", base_model_name="tiny/llama", task_type="CAUSAL_LM")
    assert folder == tmp_path / "a"
    return model, folder


def test_peft_computes_the_same_with_what_we_save(saved, llama, tokens):
    model, folder = saved
    assert (model(tokens).logits - llama()(tokens).logits).abs().max() > 0.01
    assert_the_same_model(peft.PeftModel.from_pretrained(llama(), folder).eval(), model, tokens)


def test_peft_reads_our_settings_as_its_own(saved, settings, llama):
    _, folder = saved
    theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
    wanted, config = peft_config(settings), theirs.peft_config["default"]
    for option in ("r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "lora_bias", "use_dora"):
        assert getattr(config, option) == getattr(wanted, option), option
    assert config.rank_pattern == wanted.rank_pattern and config.alpha_pattern == wanted.alpha_pattern
    assert (config.base_model_name_or_path, config.task_type) == ("tiny/llama", "CAUSAL_LM")


def test_targets_are_written_as_they_were_given(saved, settings):
    _, folder = saved
    written = json.loads((folder / CONFIG_FILE).read_text())
    targets = settings["target_modules"]
    if targets == "all-linear":
        targets = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert written["target_modules"] == (targets if isinstance(targets, str) else list(targets))
    assert written["exclude_modules"] == (list(settings["exclude_modules"]) if "exclude_modules" in settings else None)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_we_load_what_peft_saves(llama, tokens, tmp_path, settings):
    theirs = peft.get_peft_model(llama(), peft_config(settings)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = llama()
    report = load_adapter(model, tmp_path)
    assert_the_same_model(model, theirs, tokens)
    assert report.trainable == 0 and not any(p.requires_grad for p in model.parameters())
    assert len(report.replaced) == sum(isinstance(m, peft.tuners.lora.Linear) for m in theirs.modules())
    wanted = {k: v for k, v in settings.items() if k not in ("target_modules", "exclude_modules", "use_dora")}
    if settings.get("use_dora"):
        wanted |= {"dropout_base": True, "detach_norm": True}
    assert type(config_of(model)) is type(our_config(settings))
    assert {k: getattr(config_of(model), k) for k in wanted} == wanted


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def wide(request, llama, tokens, tmp_path):
    """(PEFT's model, the folder it wrote, its logits), of a rank over the matrix size.

    ``adapt`` refuses such a rank; what exists is loaded, run and written as it is.
    """
    config = peft_config({"target_modules": ("q_proj", "v_proj"), "r": 40, "use_dora": request.param})
    theirs = peft.get_peft_model(llama(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        return theirs, tmp_path / "theirs", theirs(tokens).logits


@torch.no_grad()
def test_a_rank_over_the_matrix_size_that_peft_wrote_is_read_and_written(wide, llama, tokens, tmp_path):
    _, folder, logits = wide
    model = llama()
    report = load_adapter(model, folder)
    assert {r.rank for r in report.replaced} == {40} and {min(r.shape) for r in report.replaced} == {16, 32}
    assert_close(model(tokens).logits, logits)
    save_adapter(model, tmp_path / "ours")
    ours, written = (load_file(path / WEIGHTS_FILE) for path in (tmp_path / "ours", folder))
    assert ours.keys() == written.keys() and all(torch.equal(t, written[name]) for name, t in ours.items())


@torch.no_grad()
def test_a_rank_over_the_matrix_size_is_served(wide, llama, tokens):
    _, folder, logits = wide
    with AdapterBank(llama()) as bank:
        bank.load("wide", folder)
        with bank.batch([None, "wide"]):
            assert_close(bank.model(tokens).logits[1], logits[1])


@torch.no_grad()
def test_a_rank_over_the_matrix_size_is_accelerated(wide, tokens):
    theirs, _, logits = wide
    assert len(accelerate(theirs).replaced) == 4
    assert_close(theirs(tokens).logits, logits)


def test_our_own_round_trip_is_exact(saved, llama, tokens):
    model, folder = saved
    again = llama()
    load_adapter(again, folder, trainable=True)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained


def test_what_was_loaded_is_saved_byte_for_byte(saved, llama, tmp_path):
    _, folder = saved
    again = llama()
    load_adapter(again, folder, trainable=True)
    save_adapter(again, tmp_path / "again", base_model_name="tiny/llama", task_type="CAUSAL_LM")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_undoing_a_load_leaves_the_model_as_it_was(saved, llama):
    _, folder = saved
    again = llama()
    before = {
        n: (t.clone(), p.requires_grad)
        for (n, t), p in zip(again.state_dict().items(), again.parameters(), strict=True)
    }
    load_adapter(again, folder, trainable=True).undo()
    state = again.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[n], t) for n, (t, _) in before.items())
    assert all(p.requires_grad == before[n][1] for n, p in again.named_parameters())


def compiled(model):
    return torch.compile(model)


def a_layer_compiled(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def a_layer_checkpointed(model):
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


@pytest.mark.parametrize("wrap", [compiled, a_layer_compiled, a_layer_checkpointed])
@pytest.mark.parametrize("config", [LoRAConfig(r=2), LoRAConfig(r=2, bias="all"), MultiLoRAConfig(ranks=(2,))])
def test_names_that_wrappers_add_are_not_in_the_file(llama, tmp_path, wrap, config):
    model = llama()
    adapt(model, config)
    randomise(model)
    adapter = 0 if isinstance(config, MultiLoRAConfig) else None
    save_adapter(model, tmp_path / "plain", adapter=adapter)
    save_adapter(wrap(model), tmp_path / "wrapped", adapter=adapter)
    plain, wrapped = (load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("plain", "wrapped"))
    assert wrapped.keys() == plain.keys()
    assert all(torch.equal(t, wrapped[name]) for name, t in plain.items())


def test_a_model_on_the_meta_device_takes_no_adapter(llama, tmp_path):
    model = llama()
    adapt(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    save_adapter(model, tmp_path)
    with torch.device("meta"):
        absent = llama()
    with pytest.raises(ValueError, match=r"load_adapter: .*meta device: model\.layers\.0\.self_attn\.q_proj"):
        load_adapter(absent, tmp_path)
    assert config_of(absent) is None


def test_what_trains_and_is_not_written_is_named(llama, tmp_path, caplog):
    model = llama()
    adapt(model, LoRAConfig(r=2, target_modules=("q_proj",), bias="all"))
    with caplog.at_level("WARNING", "lowrank_kernels"):
        save_adapter(model, tmp_path)
        assert not caplog.messages
        model.lm_head.weight.requires_grad_(True)
        save_adapter(model, tmp_path)
    assert len(caplog.messages) == 1
    assert "these train, and are not in the file: lm_head.weight; name their modules in modules_to_save" in caplog.text
    save_adapter(model, tmp_path, config=replace(config_of(model), modules_to_save=("lm_head",)))
    assert len(caplog.messages) == 1
    assert torch.equal(load_file(tmp_path / WEIGHTS_FILE)["base_model.model.lm_head.weight"], model.lm_head.weight)


def test_a_module_of_the_file_that_takes_no_adapter_is_named_with_the_reason(llama, tmp_path):
    model = llama()
    adapt(model, LoRAConfig(r=2, target_modules=("q_proj", "v_proj")))
    save_adapter(model, tmp_path)
    other = llama()
    weight = other.model.layers[0].self_attn.q_proj.weight
    other.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"unexpected: .*q_proj.*take no adapter: model\.layers\.0\.self_attn\.q_proj: quantised"
    ):
        load_adapter(other, tmp_path)


OVERLAPPING = {
    "ranks": {"rank_pattern": {r"layers\.1\..*": 2, "down_proj": 5}},
    "alphas": {"alpha_pattern": {r"layers\.1\..*": 2, "down_proj": 5, "v_proj": 7}, "rslora": True},
    "both": {"rank_pattern": {".*v_proj": 3, "v_proj": 4}, "alpha_pattern": {r"^model\..*0.*": 4, "down_proj": 5}},
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_patterns_that_overlap_are_written_so_that_no_order_matters(llama, tokens, tmp_path, kind):
    """The first that matches wins; PEFT, which sorts them when it saves, reads what is meant, and so do we."""
    model = llama()
    adapt(model, LoRAConfig(target_modules=("down_proj", "v_proj"), r=6, **OVERLAPPING[kind]))
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert_the_same_model(theirs, model, tokens)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "theirs").eval()
    assert_the_same_model(again, model, tokens)
    for folder in ("ours", "theirs"):
        loaded = llama()
        load_adapter(loaded, tmp_path / folder)
        assert_the_same_model(loaded, model, tokens)


def test_patterns_of_pefts_that_overlap_and_disagree_are_refused(llama, tmp_path):
    """Their order is lost on disk: PEFT itself reads another model than it saved."""
    patterns = {r"layers\.1\..*": 2, "down_proj": 5}
    config = peft.LoraConfig(target_modules=["down_proj"], r=6, alpha_pattern=patterns)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    scalings = [
        [m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
        for model in (theirs, again)
    ]
    assert scalings[0] != scalings[1]
    with pytest.raises(
        ValueError, match=r"alpha_pattern in .*layers\.1\.mlp\.down_proj one value, got 'down_proj': 5 and"
    ):
        load_adapter(llama(), tmp_path)


def test_base_weights_in_the_file_must_be_the_models_own(llama, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS_FILE)
    assert [r.name for r in load_adapter(llama(), tmp_path).replaced] == ["lm_head"]
    other = llama()
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight to be the model's own value"):
        load_adapter(other, tmp_path)
    assert type(other.lm_head) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factor_dtypes_are_kept_on_disk_and_widened_in_memory(llama, tmp_path, dtype):
    model = llama(torch.bfloat16)
    adapt(model, LoRAConfig(r=2, target_modules=("q_proj",), dtype=dtype))
    randomise(model)
    save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {dtype}
    again = llama(torch.bfloat16)
    load_adapter(again, tmp_path)
    name = "model.layers.0.self_attn.q_proj.lora_B.weight"
    factor = again.get_parameter(name)
    assert factor.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(factor, model.get_parameter(name).to(factor.dtype))


def test_a_merged_model_and_a_shared_factor_save(llama, tokens, tmp_path):
    model = llama()
    adapt(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    randomise(model)
    first, second = (m for m in model.modules() if isinstance(m, LoRALinear))
    second.lora_A = first.lora_A
    logits = model(tokens).logits
    first.merge_()
    save_adapter(model, tmp_path)
    again = llama()
    load_adapter(again, tmp_path)
    assert_close(again(tokens).logits, logits)


def test_layers_put_in_by_hand_save_with_their_config(tmp_path):
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(6, 6), 3, alpha=6))
    with pytest.raises(ValueError, match="pass config="):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"expected 0 to have .* = \(4, 6,"):
        save_adapter(model, tmp_path, config=LoRAConfig(r=4, alpha=6, target_modules=("0",)))
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path, config=LoRAConfig(r=3, alpha=6, target_modules=("0",)))
    assert set(load_file(tmp_path / WEIGHTS_FILE)) == {f"base_model.model.0.lora_{f}.weight" for f in "AB"}


def test_a_dora_file_has_pefts_keys_in_both_directions(llama, tmp_path):
    settings = {"target_modules": ("q_proj",), "use_dora": True, "r": 2}
    model = llama()
    adapt(model, our_config(settings))
    save_adapter(model, tmp_path / "ours")
    peft.get_peft_model(llama(), peft_config(settings)).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / WEIGHTS_FILE) for who in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert sum(n.endswith("q_proj.lora_magnitude_vector") for n in ours) == 2
    for name, t in theirs.items():
        if "magnitude" in name:  # both start at the norms of W
            torch.testing.assert_close(ours[name], t, rtol=1e-6, atol=0)


def test_a_config_that_is_not_of_the_layers_method_is_refused(tmp_path):
    for layer, config in ((DoRALinear, LoRAConfig), (LoRALinear, DoRAConfig)):
        model = nn.Sequential(layer(nn.Linear(6, 6), 3))
        with pytest.raises(ValueError, match=r"gate, dora, lamda\) = \(3, 16.0, .*got"):
            save_adapter(model, tmp_path, config=config(r=3, target_modules=("0",)))
    save_adapter(model, tmp_path, config=LoRAConfig(r=3, target_modules=("0",)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m[:-1], r"lora_magnitude_vector of shape \(5,\), got \(4,\)"),
        (lambda m: m[:, None], r"of shape \(5,\), got \(5, 1\)"),
        (lambda m: m * float("nan"), r"NaN or Inf in 0\.lora_magnitude_vector"),
    ],
)
def test_bad_magnitudes_are_named(tmp_path, change, match):
    model = toy()
    adapt(model, DoRAConfig(r=2, target_modules=("0",)))
    save_adapter(model, tmp_path)
    name = "base_model.model.0.lora_magnitude_vector"
    edit_tensors(lambda t: t.update({name: change(t[name]).contiguous()}))(tmp_path)
    fresh = toy()
    with pytest.raises(ValueError, match=match):
        load_adapter(fresh, tmp_path)
    assert type(fresh[0]) is nn.Linear


def test_magnitudes_without_dora_are_unexpected(tmp_path):
    model = toy()
    adapt(model, DoRAConfig(r=2))
    save_adapter(model, tmp_path)
    edit_config(use_dora=False)(tmp_path)
    with pytest.raises(ValueError, match=r"missing: none; unexpected: base_model\.model\.0\.lora_magnitude_vector"):
        load_adapter(toy(), tmp_path)


# ------------------------------------------------------------------------------------------------------- saving safely


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


@pytest.fixture
def folder(tmp_path):
    """A sound adapter of :func:`toy`, with biases."""
    model = toy()
    adapt(model, LoRAConfig(r=2, bias="lora_only", target_modules=("0", "2")))
    randomise(model)
    return save_adapter(model, tmp_path / "adapter")


def test_saving_refuses_nan_and_keeps_what_was_there(folder):
    model = toy()
    report = adapt(model, LoRAConfig(r=2))
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    for value in (float("nan"), float("inf")):
        model[0].lora_B.weight.data[0, 0] = value
        with pytest.raises(
            ValueError, match=r"NaN or Inf in base_model\.model\.0\.lora_B\.weight; nothing was written"
        ):
            save_adapter(model, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    report.undo()
    with pytest.raises(ValueError, match="found none in Sequential"):
        save_adapter(model, folder)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(folder, monkeypatch):
    model = toy()
    adapt(model, LoRAConfig(r=2))
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_saving_replaces_a_link_instead_of_following_it(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG_FILE).symlink_to(target)
    model = toy()
    adapt(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "a")
    assert target.read_text() == "precious"
    assert not (tmp_path / "a" / CONFIG_FILE).is_symlink()


# ------------------------------------------------------------------------------------------- folders that cannot be had


def edit_config(**changes):
    def edit(folder):
        file = folder / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        tensors = change(tensors) or tensors
        save_file(tensors, folder / WEIGHTS_FILE)

    return edit


def set_header(length, body=b""):
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", length) + body)


def truncate(size):
    def edit(folder):
        file = folder / WEIGHTS_FILE
        file.write_bytes(file.read_bytes()[:size])

    return edit


def only_pickle(folder):
    (folder / WEIGHTS_FILE).unlink()

    class Bomb:
        def __reduce__(self):
            return (os.makedirs, (str(folder / "ran"),))

    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


def move_out(name):
    def edit(folder):
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return edit


def fifo(folder):
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)


A0 = "base_model.model.0.lora_A.weight"
BAD_FOLDERS = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "expected adapter_config.json in"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), r"expected adapter_model\.safetensors in"),
    "pickle": (only_pickle, r"adapter_model\.bin, a pickle"),
    "config not json": (lambda f: (f / CONFIG_FILE).write_text("{"), "to hold JSON"),
    "config not text": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "to hold JSON"),
    "config too deep": (lambda f: (f / CONFIG_FILE).write_text("[" * 10**6), "to hold JSON"),
    "config a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "JSON object, got list"),
    "config too big": (lambda f: (f / CONFIG_FILE).write_text(" " * (9 << 20)), "of at most 2097152 bytes"),
    "other method": (edit_config(peft_type="IA3"), "peft_type 'LORA', got 'IA3'"),
    "no method": (edit_config(peft_type=None), "peft_type 'LORA', got None"),
    "dora without magnitudes": (edit_config(use_dora=True), r"missing: base_model\.model\.0\.lora_magnitude_vector, "),
    "dora with a bias of B's": (edit_config(use_dora=True, lora_bias=True), "DoRAConfig: expected lora_bias to be F"),
    "modules_to_save": (edit_config(modules_to_save="1"), "modules_to_save to be names of modules, got '1'"),
    "a head that is not there": (edit_config(modules_to_save=["2"]), r"missing: .*2\.weight"),
    "several": (
        edit_config(alora_invocation_tokens=[1], layer_replication=[[0, 2]]),
        "alora_invocation_tokens=.*layer_repl",
    ),
    "layers": (
        edit_config(layers_to_transform=[0], target_modules=["o"]),
        "layers_to_transform to name layers of the model with targets",
    ),
    "layers of words": (edit_config(layers_to_transform=["a"]), "layers_to_transform to be numbers of layers"),
    "layers of a regex": (edit_config(layers_to_transform=[0], target_modules=".*"), "to be numbers of layers, beside"),
    "layers' pattern": (
        edit_config(layers_to_transform=0, layers_pattern="("),
        "layers_pattern: expected a regular expression",
    ),
    "from the future": (edit_config(hyper_lora=3), "not supported: hyper_lora=3"),
    "pissa": (edit_config(init_lora_weights="pissa_niter_4"), "not supported: init_lora_weights='pissa_niter_4'"),
    "no rank": (edit_config(r=None), "expected r in"),
    "rank zero": (edit_config(r=0), "r to be an integer of at least 1, got 0"),
    "rank text": (edit_config(r="2"), "r to be an integer"),
    "huge rank": (edit_config(r=10**12), "r to be at most 2147483647, got 1000000000000"),
    "alpha nan": (edit_config(lora_alpha=float("nan")), "to hold JSON: NaN is not a number"),
    "dropout": (edit_config(lora_dropout=2), "dropout"),
    "regex": (edit_config(target_modules="("), "regular expression"),
    "pattern": (edit_config(rank_pattern=["a"]), "rank_pattern to be a dict"),
    "bias mode": (edit_config(bias="boft_only"), "bias to be one of"),
    "targets": (edit_config(target_modules=["c_attn"]), "replaces nothing in this Sequential"),
    "fewer targets": (edit_config(target_modules=["0"]), r"unexpected: .*base_model\.model\.2\."),
    "no biases": (edit_config(bias="none"), r"0\.base_layer\.bias to be the model's own value"),
    "missing": (edit_tensors(lambda t: t.pop(A0) is None), r"missing: base_model\.model\.0\.lora_A\.weight"),
    "unexpected": (edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(2)})), r"unexpected: lm_head\.weight"),
    "dots": (edit_tensors(lambda t: t.update({"../../x": torch.ones(2)})), r"unexpected: \.\./\.\./x"),
    "old prefix": (
        edit_tensors(lambda t: {k.removeprefix("base_model."): v for k, v in t.items()}),
        r"unexpected: model\.",
    ),
    "shape": (edit_tensors(lambda t: t.update({A0: torch.ones(2, 7)})), r"of shape \(2, 6\), got \(2, 7\)"),
    "nan": (edit_tensors(lambda t: t[A0].__setitem__((0, 0), float("nan"))), r"NaN or Inf in 0\.lora_A\.weight"),
    "inf": (edit_tensors(lambda t: t[A0].__setitem__((0, 0), -float("inf"))), r"NaN or Inf in 0\.lora_A\.weight"),
    "empty file": (truncate(0), "truncated or not safetensors"),
    "half a length": (truncate(5), "truncated or not safetensors"),
    "half a header": (truncate(60), "truncated or not safetensors"),
    "half the data": (truncate(-8), "whole safetensors file"),
    "gigantic header": (set_header(2**63), r"of at most \d+ bytes, got 9223372036854775808"),
    "large header": (set_header(2 << 20, b" " * (2 << 20)), r"of at most \d+ bytes, got 2097152"),
    "header not json": (set_header(4, b"abcd"), "whole safetensors file"),
    "weights linked out": (move_out(WEIGHTS_FILE), "to be in its folder, got a link to"),
    "config linked out": (move_out(CONFIG_FILE), "to be in its folder, got a link to"),
    "fifo": (fifo, "to be a regular file"),
}
BAD_TYPES = {
    "int8": (edit_tensors(lambda t: t.update({A0: torch.ones(2, 6, dtype=torch.int8)})), "of F32, .* got I8"),
    "float8": (edit_tensors(lambda t: t.update({A0: torch.ones(2, 6).to(torch.float8_e4m3fn)})), "got F8_E4M3"),
}


@pytest.mark.parametrize("kind", [*BAD_FOLDERS, *BAD_TYPES])
def test_bad_folders_are_named_and_change_nothing(folder, kind):
    edit, match = {**BAD_FOLDERS, **BAD_TYPES}[kind]
    edit(folder)
    model = toy()
    modules, state = [id(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError if kind in BAD_TYPES else ValueError, match=match) as error:
        load_adapter(model, folder)
    assert str(error.value).startswith("load_adapter: ") or "adapt: target_modules" in str(error.value)
    assert [id(m) for m in model.modules()] == modules
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    assert config_of(model) is None
    assert not (folder / "ran").exists()


def test_the_sound_folder_loads(folder):
    model = toy()
    assert [r.name for r in load_adapter(model, folder).replaced] == ["0", "2"]
    with pytest.raises(ValueError, match="adapted already"):
        load_adapter(model, folder)


def test_not_a_folder(tmp_path):
    with pytest.raises(ValueError, match="expected a folder, got"):
        load_adapter(toy(), tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder, got"):
        load_adapter(toy(), tmp_path / "file")


def test_links_within_the_folder_and_into_a_hub_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate((CONFIG_FILE, WEIGHTS_FILE)):
        (folder / file).rename(blobs / str(i))
        (snapshot / file).symlink_to(blobs / str(i))
    assert len(load_adapter(toy(), snapshot).replaced) == 2


def test_a_failure_while_filling_takes_the_adapter_off(folder, monkeypatch):
    model = toy()
    before = copy.deepcopy(model.state_dict())

    def broken(model):
        if config_of(model) is not None:
            raise MemoryError
        return named_buffers(model)

    monkeypatch.setattr(load, "named_buffers", broken)
    with pytest.raises(MemoryError):
        load_adapter(model, folder)
    assert type(model[0]) is nn.Linear and config_of(model) is None
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_configs_of_older_peft_need_fewer_keys(folder):
    file = folder / CONFIG_FILE
    whole = json.loads(file.read_text())
    old = {k: whole[k] for k in ("peft_type", "r", "lora_alpha", "target_modules", "bias")}
    file.write_text(json.dumps({**old, "fan_in_fan_out": False, "modules_to_save": None}))
    model = toy()
    load_adapter(model, folder)
    assert replace(config_of(model), init="kaiming") == LoRAConfig(r=2, target_modules=("0", "2"), bias="lora_only")


def test_a_copy_of_a_base_weight_is_compared_in_the_narrower_dtype(llama, tokens, tmp_path):
    """PEFT writes the head beside its adapter; from a bfloat16 model it is the float32 one's, rounded."""
    theirs = peft.get_peft_model(
        llama().to(torch.bfloat16), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    load_adapter(llama(), tmp_path)
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"lm_head.*to be the model's own value"):
        load_adapter(other, tmp_path)
