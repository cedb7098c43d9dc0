"""SHERL: the side path's formula, layers without backward, the start, caches, refusals, the way back, files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import transformers as tf

import lowrank_kernels as lk
from lowrank_kernels.reference.sherl import side_feature_ref, side_merge_ref
from lowrank_kernels.side import (
    SHERLConfig,
    SideFeature,
    SideMerge,
    SideStack,
    late_targets,
    load_sherl,
    save_sherl,
    sherl,
)

IDS = torch.arange(3, 27).reshape(2, 12) * 7 % 61
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LINEARS = ("q_proj", "v_proj", "down_proj", "c_attn", "query", "dense")
CPU = torch.device("cpu")


def llama(layers: int = 5, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=1, num_hidden_layers=layers, **settings)
    return tf.LlamaForCausalLM(config).to(dtype)


def gpt2() -> Any:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=5, n_head=2, n_positions=32))


def bert() -> Any:
    torch.manual_seed(0)
    return tf.BertForMaskedLM(tf.BertConfig(**SIZES, num_hidden_layers=5, max_position_embeddings=32))


ARCHITECTURES = {"llama": llama, "gpt2": gpt2, "bert": bert}


@torch.no_grad()
def off_the_start(model: nn.Module, parts: tuple[str, ...] = ("lora_", "sherl.")) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if any(part in name for part in parts):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def with_side_path(model: Any, late_layers: int = 2, width: int = 4) -> SideStack:
    """The model with LoRA in its late layers, a side path, and in training."""
    config = SHERLConfig(late_layers, width)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=late_targets(model, config, LINEARS)))
    sherl(model, config)
    off_the_start(model)
    model.train()
    (stack,) = (m for m in model.modules() if isinstance(m, SideStack))
    return stack


# The formula


def merge(width: int = 6, inputs: int = 5, dtype: torch.dtype = torch.float64) -> SideMerge:
    torch.manual_seed(0)
    made = SideMerge(inputs, width, dtype, CPU)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made


def merged_by_reference(made: SideMerge, features: Tensor, last: Tensor) -> Tensor:
    tokens = [
        side_merge_ref(list(u[:-1]), u[-1], made.score, made.out, made.g, h)
        for u, h in zip(features.flatten(0, -3), last.flatten(0, -2), strict=True)
    ]
    return torch.stack(tokens).reshape(last.shape)


def features_with_zeros(dtype: torch.dtype = torch.float64) -> Tensor:
    """Of 3 x 4 tokens and 5 layers: of both signs, some of them zero."""
    torch.manual_seed(2)
    features = torch.randn(3, 4, 5, 6, dtype=dtype)
    features[0, 0, 1] = 0.0
    features[0, 1, :-1] = 0.0
    features[0, 2] = 0.0
    features[0, 3, 2] = features[0, 3, 0]  # redundant
    return features


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_side_path_is_the_formula(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    feature, h = SideFeature(5, 6, dtype, CPU), torch.randn(2, 3, 5, dtype=dtype)
    expected = [side_feature_ref(t, feature.down, feature.mix, feature.gate) for t in h.flatten(0, 1)]
    torch.testing.assert_close(feature(h), torch.stack(expected).reshape(2, 3, 6), rtol=bound, atol=bound)
    made, features, last = merge(dtype=dtype), features_with_zeros(dtype), torch.randn(3, 4, 5, dtype=dtype)
    expected_merge = merged_by_reference(made, features, last)
    torch.testing.assert_close(made(features, last), expected_merge, rtol=bound, atol=bound)


def test_gradients_are_those_of_the_formula() -> None:
    made, last = merge(), torch.randn(3, 4, 5, dtype=torch.float64)
    features = features_with_zeros()[1:].requires_grad_()  # where no vector is zero it is smooth
    last = last[1:].requires_grad_()
    weight = torch.randn(last.shape, dtype=torch.float64)
    wanted = [features, last, *made.parameters()]
    found = torch.autograd.grad((made(features, last) * weight).sum(), wanted)
    expected = torch.autograd.grad((merged_by_reference(made, features, last) * weight).sum(), wanted)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("zero", ["features", "score", "shallow", "deep", "tiny"])
def test_where_all_weights_are_zero_nothing_is_divided_by_it(zero: str) -> None:
    made = merge(dtype=torch.float32)
    features, last = features_with_zeros(torch.float32), torch.randn(3, 4, 5)
    with torch.no_grad():
        if zero == "score":
            made.score.zero_()
        elif zero == "shallow":
            features[..., :-1, :] = 0.0
        elif zero == "deep":
            features[..., -1, :] = 0.0
        else:
            features.mul_(0.0 if zero == "features" else 1e-30)
    features.requires_grad_()
    found = made(features, last)
    grads = torch.autograd.grad(found.sum(), [features, *made.parameters()])
    assert found.isfinite().all() and all(g.isfinite().all() for g in grads)
    if zero != "tiny":
        expected = features[..., -1, :].relu() @ made.out.T + (made.g / 0.1).tanh() * last
        torch.testing.assert_close(found, expected)


def test_the_weight_of_a_redundant_feature_is_shared() -> None:
    """Two equal features weigh together what one of them would alone, beside an orthogonal third."""
    made = merge()
    with torch.no_grad():
        made.score.fill_(1.0)
        made.out.copy_(torch.eye(5, 6))
        made.g.zero_()
    eye, deep = torch.eye(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    found = made(torch.stack([eye[0], eye[0], eye[1], deep])[None], torch.zeros(1, 5, dtype=torch.float64))
    torch.testing.assert_close(found[0], torch.tensor([1.5, 1.5, 1.0, 1.0, 1.0], dtype=torch.float64))


# In a model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_the_start_the_model_computes_what_it_did(architecture: str) -> None:
    model = ARCHITECTURES[architecture]().eval()
    expected = model(input_ids=IDS).logits
    report = sherl(model, SHERLConfig(2, 4))
    assert torch.equal(model(input_ids=IDS).logits, expected)
    off_the_start(model)
    assert not torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-3)
    report.undo()
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_the_late_layers_get_the_merge_of_the_early_outputs() -> None:
    model = llama(dtype=torch.float64).eval()
    plain = copy.deepcopy(model)
    stack = with_side_path(model)
    model.eval()
    outputs: list[Tensor] = []
    for layer in plain.model.layers:
        layer.register_forward_hook(lambda m, args, out: outputs.append(out))
    got: list[Tensor] = []
    stack[3].register_forward_pre_hook(lambda m, args: got.append(args[0]))
    plain(input_ids=IDS)
    model(input_ids=IDS)
    features = torch.stack([stack[i].sherl(outputs[i]) for i in range(3)], -2)
    torch.testing.assert_close(got[0], stack[3].sherl(features, outputs[2]))


def saved_tensors(function: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return saved


def test_nothing_is_saved_of_the_early_layers_but_their_outputs() -> None:
    """Each early layer that is added costs its output and a side feature's four tensors, whatever is within it."""
    found = {}
    for intermediate in (24, 240):
        for early in (3, 6):
            model = llama(early + 2)
            for layer in model.model.layers[:early]:
                layer.mlp = type(layer.mlp)(tf.LlamaConfig(**{**SIZES, "intermediate_size": intermediate}))
            stack = with_side_path(model)
            hidden = torch.randn(2, 12, 16, requires_grad=True)
            rotary = model.model.rotary_emb(hidden, torch.arange(12)[None])
            saved = saved_tensors(lambda: stack(hidden, position_embeddings=rotary))  # noqa: B023
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
            found[intermediate, early] = sum(size for place, size in sizes.items() if place not in own)
    assert found[24, 3] == found[240, 3] and found[24, 6] == found[240, 6]
    tokens, inputs, width = 24, 16, 4
    a_layer = (found[24, 6] - found[24, 3]) / 3 / 4 / tokens
    assert inputs < a_layer <= inputs + 12 * width


def test_no_gradient_below_the_late_layers() -> None:
    model = llama()
    with_side_path(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == trained
    assert all(".sherl." in n or (".lora_" in n and (".3." in n or ".4." in n)) for n in trained)
    assert {n for n in trained if ".0." in n} == {f"model.layers.0.sherl.{part}" for part in ("down", "mix", "gate")}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generation_is_the_same_with_and_without_a_cache(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    with_side_path(model)
    model.eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(IDS, use_cache=True, **settings)
    assert with_cache.shape[1] == 20
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **settings))


def test_one_early_layer_and_one_token() -> None:
    model = llama(2)
    with_side_path(model, late_layers=1)
    model.model(input_ids=IDS[:1, :1]).last_hidden_state.sum().backward()
    assert model.model.layers[0].sherl.down.grad.isfinite().all()


def test_a_bfloat16_base_has_a_side_path_of_float32() -> None:
    model = llama(dtype=torch.bfloat16)
    stack = with_side_path(model)
    assert {p.dtype for n, p in model.named_parameters() if ".sherl." in n} == {torch.float32}
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and stack[0].sherl.down.grad.dtype == torch.float32


def test_under_autocast_gradients_are_near() -> None:
    grads = []
    for enabled in (True, False):
        model = llama()
        with_side_path(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[1].norm()


@pytest.mark.parametrize("how", ["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_divides_by_no_zero(dtype: torch.dtype, how: str) -> None:
    """Many of the weights' sums are zero, and what is added to a divisor would be too, in float16."""
    model = llama().float()
    sherl(model, SHERLConfig(2, 4))
    if how == "cast":
        model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


def test_late_layers_may_be_checkpointed() -> None:
    grads = []
    for on in (False, True):
        model = llama()
        with_side_path(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(t, grads[1][n], rtol=1e-5, atol=1e-8) for n, t in grads[0].items())


def test_a_copy_computes_the_same_and_trains_by_itself() -> None:
    model = llama()
    with_side_path(model)
    model.eval()
    copied = copy.deepcopy(model)
    expected = model(input_ids=IDS).logits
    with torch.no_grad():
        model.model.layers[0].sherl.down.zero_()
    assert torch.equal(copied(input_ids=IDS).logits, expected)
    assert not torch.equal(model(input_ids=IDS).logits, expected)


# In place, and back


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_undo_gives_the_model_back(architecture: str) -> None:
    model = ARCHITECTURES[architecture]().eval()
    model.lm_head.requires_grad_(False) if hasattr(model, "lm_head") else None
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    logits, names = model(input_ids=IDS).logits, [name for name, _ in model.named_modules()]
    report = sherl(model, SHERLConfig(2, 4))
    off_the_start(model)
    model.train()
    report.undo()
    model.eval()
    assert [name for name, _ in model.named_modules()] == names and model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(input_ids=IDS).logits, logits)
    sherl(model, SHERLConfig(2, 4))  # and once more


def test_the_report_and_the_names() -> None:
    model = llama()
    report = sherl(model, SHERLConfig(2, 4))
    added = {name for name in model.state_dict() if "sherl" in name}
    assert added == {f"model.layers.{i}.sherl.{n}" for i in range(3) for n in ("down", "mix", "gate")} | {
        f"model.layers.3.sherl.{n}" for n in ("score", "out", "g")
    }
    assert "SHERL: 4 replaced" in str(report) and "merge of 3 side features" in str(report)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_targets_of_the_late_layers() -> None:
    names = late_targets(llama(), SHERLConfig(2), ("q_proj", "down_proj"))
    assert names == tuple(f"model.layers.{i}.{n}" for i in (3, 4) for n in ("self_attn.q_proj", "mlp.down_proj"))
    with pytest.raises(ValueError, match="expected modules of x"):
        late_targets(llama(), SHERLConfig(2), ("x",))
    with pytest.raises(TypeError, match="expected names to be a tuple of names, got 'q_proj'"):
        late_targets(llama(), SHERLConfig(2), "q_proj")  # type: ignore[arg-type]


def adapted_everywhere(config: Any = None) -> Any:
    model = llama()
    lk.adapt(model, config or lk.LoRAConfig(r=2))
    return model


def twice() -> Any:
    model = llama()
    sherl(model, SHERLConfig(2, 4))
    return model


def reversible() -> Any:
    model = llama()
    lk.reversible.meft(model)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(4, 4), "got a Linear, whose layers are not recognised"),
        (lambda: llama(2), "leave one or more of 2 layers below, got 2"),
        (adapted_everywhere, r"expected no adapted layers below the last 2 layers.*model\.layers\.0"),
        (lambda: adapted_everywhere(lk.LaMDAConfig(r=2)), r"expected no adapted layers.*model\.layers\.0"),
        (lambda: adapted_everywhere(lk.SVFTConfig()), r"expected no adapted layers.*model\.layers\.0"),
        (lambda: adapted_everywhere(lk.VeLoRAConfig(velora=2)), r"expected no adapted layers.*model\.layers\.0"),
        (twice, "has a side path already"),
        (reversible, "expected the model's own layers, got a ReversibleStack in their place; call undo"),
    ],
)
def test_what_is_refused_is_left_as_it_was(make: Callable[[], Any], words: str) -> None:
    model = make().train()
    names, flags = [name for name, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"sherl: .*{words}"):
        sherl(model, SHERLConfig(2, 4))
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == flags


def test_adapting_afterwards_leaves_the_side_path_training() -> None:
    model = llama()
    report = sherl(model, SHERLConfig(2, 4))
    adapted = lk.adapt(model, lk.LoRAConfig(r=2, target_modules=late_targets(model, SHERLConfig(2), ("q_proj",))))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or ".sherl." in name}
    adapted.undo()
    report.undo()


def test_settings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="expected late_layers to be an integer of at least 1, got 0"):
        SHERLConfig(late_layers=0)
    with pytest.raises(ValueError, match=r"expected width to be an integer of at least 1, got 1\.5"):
        SHERLConfig(width=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected config to be a SHERLConfig"):
        sherl(llama(), lk.LoRAConfig())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected model to be"):
        sherl("model")  # type: ignore[arg-type]


# Files


def test_what_is_saved_is_loaded_over_the_base(tmp_path: Path) -> None:
    model = llama()
    with_side_path(model)
    save_sherl(model.eval(), tmp_path)
    other = llama().eval()
    plain = other(input_ids=IDS).logits
    report = load_sherl(other, tmp_path)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(p.requires_grad for p in other.parameters())
    report.undo()
    assert torch.equal(other(input_ids=IDS).logits, plain) and all(p.requires_grad for p in other.parameters())
    load_sherl(other, tmp_path, trainable=True)
    theirs, ours = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (other, model))
    assert theirs == ours


def test_another_base_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    model = llama()
    with_side_path(model)
    save_sherl(model, tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    names = set(other.state_dict())
    with pytest.raises(ValueError, match=r"expected the base that was trained over, got other .*: model\.layers\.0"):
        load_sherl(other, tmp_path)
    assert set(other.state_dict()) == names
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"expected the base that was trained over, got other .*: all but model\.lay"):
        load_sherl(other, tmp_path)
    with pytest.raises(ValueError, match=r"expected a model that lk\.side\.sherl made"):
        save_sherl(other, tmp_path)
