"""Embeddings, convolutions and GPT-2's Conv1D beside PEFT: our layers from its files, and its layers on our ops."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Conv1d
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel, WhisperConfig, WhisperModel

import lowrank_kernels as lk
from lowrank_kernels.integrations.peft import accelerate, restore
from tests.integrations.beside_peft import assert_close


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(11, 8, padding_idx=0), nn.Conv1d(8, 6, 4, padding="same")
        self.stem, self.point = nn.Conv2d(3, 8, 3, stride=2, padding="valid"), nn.Conv2d(8, 8, 1)
        self.patch, self.wide = nn.Conv2d(8, 6, 4, stride=4), nn.Conv2d(6, 6, (2, 3), padding=(1, 2), bias=False)
        self.volume, self.head = nn.Conv3d(1, 4, 2, stride=2), nn.Linear(6, 5)

    def forward(self, ids, images):
        words = self.mix(self.words(ids).mT).mean(-1)
        pictures = self.wide(torch.relu(self.patch(self.point(torch.relu(self.stem(images))))))
        depth = self.volume(images[:, None]).mean((1, 2, 3, 4))
        return self.head(words + pictures.mean((2, 3)) + depth[:, None])


def gpt2():
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )
    return model, lambda m: m(torch.arange(18).view(2, 9) * 3).logits, ["wte", "c_attn", "c_proj"]


def convnet():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 33, 33, generator=generator)
    ids = torch.tensor([[0, 1, 2, 2], [4, 5, 0, 10]])
    targets = ["words", "mix", "stem", "point", "patch", "wide", "volume", "head"]
    return ConvNet(), lambda m: m(ids, images), targets


def vit():
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            **settings,
        ),
        add_pooling_layer=False,
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    linears = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return model, lambda m: m(images).last_hidden_state, ["projection", linears[0]]


def whisper():
    model = WhisperModel(
        WhisperConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            dropout=0.0,
        )
    )
    sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
    words = torch.tensor([[1, 5, 7], [1, 9, 0]])
    run = lambda m: m(input_features=sound, decoder_input_ids=words).last_hidden_state  # noqa: E731
    return model, run, ["conv1", "conv2", "q_proj", "embed_tokens"]


MODELS = {"gpt2": gpt2, "convnet": convnet, "vit": vit, "whisper": whisper}


def make(name, **settings):
    """(PEFT's model, its base, what runs it): factors and magnitudes are random."""
    torch.manual_seed(0)
    base, run, targets = MODELS[name]()
    plain = copy.deepcopy(base)
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": targets} | settings))
    theirs = get_peft_model(base, config)
    for module in theirs.modules():
        if isinstance(module, Conv1d):  # which Whisper asks for, and PEFT's layer does not have
            module.stride = module.base_layer.stride
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "magnitude" in key:
                p.mul_(1.0 + 0.3 * torch.rand_like(p))
            elif p.requires_grad:
                p.normal_(std=0.2)
    return theirs, plain, run


def gradients(model, run):
    """(y, {name without PEFT's prefixes and adapter's name: gradient}) of a loss that sees every output."""
    model.zero_grad()
    y = run(model)
    y.sin().sum().backward()
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            key = name.removeprefix("base_model.model.").replace(".default", "")
            grads[key.replace("magnitude_vector.weight", "magnitude_vector")] = p.grad.clone()
    return y.detach(), grads


def assert_same(ours, theirs, run):
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        y, grads = gradients(ours, run)
        expected, expected_grads = gradients(theirs, run)
        assert_close(y, expected, 1e-6)
        assert grads.keys() == expected_grads.keys() and grads
        for name, grad in expected_grads.items():
            assert_close(grads[name], grad, 3e-6, name)


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian", "r": 2},
}


def read_from_peft(name, dora, settings, folder):
    """(our model with the adapter that PEFT wrote, PEFT's, their base, what runs either, the report)."""
    theirs, plain, run = make(name, use_dora=dora, **SETTINGS[settings])
    theirs.save_pretrained(folder / "theirs")
    ours = copy.deepcopy(plain)
    report = lk.load_adapter(ours, folder / "theirs", trainable=True)
    return ours, theirs, plain, run, report


# Every setting with two of the models; the others with none.
FILES = [(name, "plain") for name in MODELS]
FILES += [(name, settings) for name in ("gpt2", "convnet") for settings in SETTINGS if settings != "plain"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(("name", "settings"), FILES)
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_pefts_is_the_same_function_here(name, dora, settings, tmp_path):
    ours, theirs, _, run, report = read_from_peft(name, dora, settings, tmp_path)
    assert len(report.replaced) == len([m for m in theirs.modules() if hasattr(m, "lora_variant")])
    assert all(r.kind.startswith(("LoRA", "DoRA")) for r in report.replaced)
    assert_same(ours, theirs, run)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(("name", "settings"), FILES)
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_pefts_goes_back_as_it_came(name, dora, settings, tmp_path):
    ours, theirs, plain, run, _ = read_from_peft(name, dora, settings, tmp_path)
    lk.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    for module in again.modules():
        if isinstance(module, Conv1d):
            module.stride = module.base_layer.stride
    assert torch.equal(run(again), run(theirs.eval()))
    own, saved = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    copies = {key for key in saved if key.endswith(("wte.base_layer.weight", "embed_tokens.base_layer.weight"))}
    copies |= {key for key in saved if key.endswith("lm_head.weight")}
    assert own.keys() == saved.keys() - copies
    assert all(torch.equal(own[key], saved[key]) for key in own)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, settings) for name, settings in FILES if name in ("convnet", "vit")],  # the others' embeddings are tied
)
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_pefts_is_merged_and_unloaded(name, dora, settings, tmp_path):
    ours, _, _, run, _ = read_from_peft(name, dora, settings, tmp_path)
    y = run(ours.eval())
    merged = lk.merge_and_unload(ours)
    assert_close(run(merged).detach(), y.detach(), 2e-5)
    assert not any(hasattr(m, "base_layer") for m in merged.modules())


@pytest.mark.parametrize("dora", [False, True])
def test_a_training_step_is_pefts(dora, tmp_path):
    theirs, plain, run = make("convnet", use_dora=dora)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(plain)
    lk.load_adapter(ours, tmp_path, trainable=True)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            run(model).square().sum().backward()
            optimizer.step()
    assert_close(run(ours).detach(), run(theirs).detach(), 5e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_fresh_layers_have_pefts_shapes_and_start(dora):
    theirs, plain, _ = make("convnet", use_dora=dora)
    config = lk.DoRAConfig if dora else lk.LoRAConfig
    lk.adapt(plain, config(r=4, target_modules=tuple(convnet()[2])))
    expected = {n.replace(".default", "").removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    expected = {n.replace("magnitude_vector.weight", "magnitude_vector"): p.shape for n, p in expected.items()}
    assert {n: p.shape for n, p in plain.named_parameters()} == expected


def test_all_linear_means_what_it_means_to_peft():
    model = gpt2()[0]
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
    names = [n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "base_layer")]
    assert [r.name for r in lk.adapt(model, lk.LoRAConfig()).replaced] == names


def test_dora_starts_at_pefts_norms():
    torch.manual_seed(0)
    base = ConvNet()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=convnet()[2], use_dora=True))
    lk.adapt(base, lk.DoRAConfig(r=2, target_modules=tuple(convnet()[2])))
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_magnitude_vector"):
            expected = theirs.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight
            assert_close(layer.lora_magnitude_vector.detach(), expected.detach(), 1e-6, name)


def test_the_config_says_fan_in_fan_out_of_conv1d(tmp_path):
    for model, targets, expected in ((gpt2()[0], ("c_attn",), True), (ConvNet(), ("stem", "head"), False)):
        lk.adapt(model, lk.LoRAConfig(r=2, target_modules=targets))
        lk.save_adapter(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is expected


def test_a_file_whose_base_embedding_is_another_is_refused(tmp_path):
    theirs, plain, _ = make("whisper")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        plain.decoder.embed_tokens.weight += 1.0
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight to be the model's own value"):
        lk.load_adapter(plain, tmp_path)
    assert type(plain.decoder.embed_tokens) is nn.Embedding


# ------------------------------------------------------------------------------------------ PEFT's layers on our ops


@pytest.fixture(params=[(name, dora) for name in MODELS for dora in (False, True)], ids=str)
def accelerated(request):
    """(name, whether DoRA, our model, PEFT's, what runs either, the report)."""
    name, dora = request.param
    theirs, _, run = make(name, use_dora=dora)
    ours = copy.deepcopy(theirs)
    return name, dora, ours, theirs, run, accelerate(ours)


def test_accelerated_layers_look_as_pefts(accelerated):
    _, _, ours, theirs, _, _ = accelerated
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())


def test_small_lora_convolutions_are_left_to_peft(accelerated):
    name, dora, _, _, _, report = accelerated
    left = {s.name.rpartition(".")[2] for s in report.skipped}
    assert left == (set() if dora else {"mix", "stem", "point", "wide", "conv1", "conv2"} & set(MODELS[name]()[2]))
    assert all("two small convolutions" in s.reason for s in report.skipped)


def test_accelerated_layers_compute_what_pefts_do(accelerated):
    _, _, ours, theirs, run, _ = accelerated
    assert_same(ours, theirs, run)


def test_an_accelerated_adapter_is_disabled(accelerated):
    _, _, ours, _, run, _ = accelerated
    y = run(ours.eval())
    with ours.disable_adapter():
        base = run(ours)
    assert not torch.allclose(base, y)


def test_an_accelerated_layer_is_merged(accelerated):
    _, _, ours, _, run, _ = accelerated
    y = run(ours.eval())
    *_, layer = (m for m in ours.modules() if hasattr(m, "lora_variant"))
    layer.merge()
    assert_close(run(ours).detach(), y.detach(), 2e-5)
    layer.unmerge()


def test_restore_puts_pefts_layers_back(accelerated):
    _, _, ours, _, _, report = accelerated
    assert restore(ours) == len(report.replaced)
    assert {type(m).__module__ for m in ours.modules() if hasattr(m, "lora_variant")} == {"peft.tuners.lora.layer"}


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_on_other_layers_are_pefts(dora):
    theirs, _, run = make("convnet", use_dora=dora)
    theirs.add_adapter("second", LoraConfig(r=2, target_modules=convnet()[2], use_dora=dora))
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "second" in key and "magnitude" not in key:
                p.normal_(std=0.2)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        assert_close(run(ours).detach(), run(theirs).detach(), 2e-6)


def test_dropout_keeps_the_mean():
    theirs, _, run = make("vit", lora_dropout=0.5, use_dora=True)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    means = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        with torch.no_grad():
            means.append(torch.stack([run(model) for _ in range(150)]).mean(0))
    with torch.no_grad():
        noise = (means[1] - run(theirs.eval())).abs().mean()
    assert (means[0] - means[1]).abs().mean() < 3 * noise


def test_layers_that_cannot_be_taken_are_listed():
    class Scaled(nn.Embedding):
        embed_scale = 2.0

        def forward(self, ids):
            return 2.0 * super().forward(ids)

    model = nn.ModuleDict(
        {"scaled": Scaled(6, 4), "renormed": nn.Embedding(6, 4, max_norm=1.0), "plain": nn.Embedding(6, 4)}
        | {"grouped": nn.Conv2d(4, 4, 3, groups=2), "attention": nn.MultiheadAttention(4, 2)}
    )
    with pytest.warns(UserWarning, match="groups"):
        theirs = get_peft_model(model, LoraConfig(r=2, target_modules=list(model)))
    report = accelerate(theirs)
    assert "base_model.model.plain" in [r.name for r in report.replaced]
    reasons = {s.name.rpartition(".")[2]: s.reason for s in report.skipped}
    assert reasons["scaled"] == "a Scaled has a forward of its own"
    assert reasons["renormed"].startswith("its max_norm=1.0")
    assert reasons["grouped"].startswith("its groups=2")
    assert reasons["attention"] == "a lora.MultiheadAttention, which no op computes"


# ------------------------------------------------------------------------------------------------------ the bank


@pytest.mark.parametrize("dora", [False, True])
def test_a_bank_serves_conv1d(dora, tmp_path):
    models = {}
    for seed, name in enumerate(("a", "b")):
        theirs, plain, _ = make("gpt2", target_modules=["c_attn", "c_proj"], use_dora=dora, lora_alpha=4 + seed)
        theirs.save_pretrained(tmp_path / name)
        models[name] = theirs.eval()
    bank = lk.serving.AdapterBank(plain.eval())
    for name in models:
        bank.load(name, tmp_path / name)
    tokens = torch.randint(64, (3, 7))
    with torch.no_grad():
        expected = [models["a"](tokens[:1]).logits, make("gpt2")[1].eval()(tokens[1:2]).logits]
        expected.append(models["b"](tokens[2:]).logits)
        with bank.batch(["a", None, "b"]):
            assert_close(plain(tokens).logits, torch.cat(expected), 2e-6)


@pytest.mark.parametrize(("name", "layer"), [("gpt2", "transformer.wte, a Embedding"), ("whisper", "conv1, a Conv1d")])
def test_a_bank_refuses_embeddings_and_convolutions_by_name(name, layer, tmp_path):
    theirs, plain, _ = make(name)
    theirs.save_pretrained(tmp_path)
    bank, before = lk.serving.AdapterBank(plain), repr(plain)
    with pytest.raises(ValueError, match=f"{layer}; a bank mixes the adapters of a batch in linears alone"):
        bank.load("x", tmp_path)
    assert repr(plain) == before and not bank.names()
