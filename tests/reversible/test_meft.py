"""MEFT: a stack of layers made reversible; gradients, memory, random numbers, refusals, the way back, files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import transformers as tf

import lowrank_kernels as lk
from lowrank_kernels.reference.reversible import reversible_ref
from lowrank_kernels.reversible import MEFTConfig, ReversibleStack, load_meft, meft, save_meft

IDS = torch.arange(3, 27).reshape(2, 12) * 7 % 61
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def llama(layers: int = 3, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=1, num_hidden_layers=layers, **settings)
    return tf.LlamaForCausalLM(config).to(dtype)


def gpt2() -> Any:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32)).double()


def bert() -> Any:
    torch.manual_seed(0)
    return tf.BertForMaskedLM(tf.BertConfig(**SIZES, num_hidden_layers=3, max_position_embeddings=32)).double()


ARCHITECTURES = {"llama": llama, "gpt2": gpt2, "bert": bert}


@torch.no_grad()
def off_the_start(model: nn.Module, parts: tuple[str, ...] = ("lora_", ".meft.")) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if any(part in name for part in parts):
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def reversible(model: Any, lora: bool = True, **settings: Any) -> ReversibleStack:
    """The model with LoRA, made reversible, and in training."""
    if lora:
        lk.adapt(model, lk.LoRAConfig(r=2, target_modules="all-linear", dtype=model.dtype))
    meft(model, MEFTConfig(**settings))
    off_the_start(model)
    model.train()
    (stack,) = (m for m in model.modules() if isinstance(m, ReversibleStack))
    return stack


def gradients(model: Any, stack: ReversibleStack, recompute: bool, autocast: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(5)
    stack.recompute = recompute
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([t.flatten().double() for t in grads.values()]) for grads in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_gradients_over_thirty_layers_in_float32(variant: int) -> None:
    model = llama(30, torch.float32)
    stack = reversible(model, variant=variant)
    mine, stored = gradients(model, stack, True), gradients(model, stack, False)
    assert 0 < difference(mine, stored) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", [1, 2, 3])
def test_gradients_with_dropout_in_float64(architecture: str, variant: int) -> None:
    """Attention, GPT-2 and BERT drop out by a tenth; LoRA's alone is on in Llama."""
    model = ARCHITECTURES[architecture]()
    lk.adapt(model, lk.LoRAConfig(r=2, dropout=0.2, target_modules="all-linear", dtype=torch.float64))
    stack = reversible(model, lora=False, variant=variant, keep_every=3)
    mine, stored = gradients(model, stack, True), gradients(model, stack, False)
    assert difference(mine, stored) < 1e-9


def test_random_numbers_go_on_where_forward_left_them() -> None:
    model = llama(attention_dropout=0.1)
    stack = reversible(model)
    gradients(model, stack, True)
    after = torch.rand(3)
    gradients(model, stack, False)
    assert torch.equal(torch.rand(3), after)


def test_a_step_between_forward_and_backward_is_told() -> None:
    model = llama()
    reversible(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    first, second = (model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(0)))
    first.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="expected the layers' parameters as they were in forward"):
        second.backward()


@pytest.mark.parametrize("lora_alone", [False, True])
def test_gradients_are_those_of_the_forward_whatever_the_modes(lora_alone: bool) -> None:
    """Dropout of LoRA in a model in evaluation, and a model that is evaluated between forward and backward."""
    model = llama(attention_dropout=0.3)
    lk.adapt(model, lk.LoRAConfig(r=2, dropout=0.5, dtype=model.dtype))
    stack = reversible(model, lora=False)
    found = []
    for stack.recompute in (True, False):
        model.train(not lora_alone)
        for module in model.modules():
            if isinstance(module, lk.nn.LoRALinear):
                module.train()
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], msg=name)


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_the_output_is_the_formula(variant: int) -> None:
    model = llama()
    plain = copy.deepcopy(model)
    reversible(model, lora=False, variant=variant, lam=0.3, beta=-0.2)
    seen: list[tuple[Any, Any]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True)
        for layer in plain.model.layers
    ]
    plain.model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    kwargs = {**seen[0][1], "cache": None}
    halves = []
    for layer, made in zip(plain.model.layers, model.model.layers.children(), strict=True):
        f: Callable[[Tensor], Tensor] = lambda x, layer=layer: layer(x, **kwargs)  # noqa: E731
        if variant == 1:
            halves.append((f, lambda x, m=made.meft: (x @ m.down.T).relu() @ m.up.T))
        elif variant == 2:
            halves.append((lambda x, m=made.meft: (x @ m.down.T).relu() @ m.up.T, f))
        else:
            halves.append(
                (
                    lambda x, m=layer: x + m.self_attn(m.input_layernorm(x), **kwargs)[0],
                    lambda x, m=layer: x + m.mlp(m.post_attention_layernorm(x)),
                )
            )
    expected = plain.model.norm(reversible_ref(seen[0][0][0], halves, 0.3, -0.2, variant != 3))
    for recompute in (True, False):
        model.model.layers.recompute = recompute
        torch.testing.assert_close(model.model(input_ids=IDS).last_hidden_state, expected, rtol=1e-12, atol=1e-12)


def saved_bytes(function: Callable[[], Any]) -> int:
    found: dict[int, int] = {}
    held = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(found.values())


@pytest.mark.parametrize("every", [1, 4, 16])
def test_what_is_kept_grows_with_the_kept_layers_alone(every: int) -> None:
    for depth in (4, 8, 16):
        model = llama(depth)
        stack = reversible(model, keep_every=every)
        hidden = torch.randn(2, 12, 16, dtype=torch.float64)
        model.model(input_ids=IDS)
        rotary = model.model.rotary_emb(hidden, torch.arange(12)[None])
        found = saved_bytes(lambda: stack(hidden, position_embeddings=rotary))  # noqa: B023
        kept = 1 + 2 * ((depth - 1) // every) + 2 * ((depth - 1) % every > 0)
        assert found == kept * hidden.nbytes + sum(t.nbytes for t in rotary)


def test_gradients_of_hidden_states_and_of_other_arguments() -> None:
    model = llama()
    stack = reversible(model, keep_every=3)
    hidden = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    rotary = [t.detach().requires_grad_() for t in model.model.rotary_emb(hidden, torch.arange(12)[None])]
    found = []
    for stack.recompute in (True, False):
        out = stack(hidden, attention_mask=mask * 2, position_embeddings=tuple(rotary))
        found.append(torch.autograd.grad(out.square().sum(), [hidden, mask, *rotary]))
    for mine, stored in zip(*found, strict=True):
        torch.testing.assert_close(mine, stored, rtol=1e-9, atol=1e-9)


def test_only_what_trains_gets_a_gradient() -> None:
    model = llama()
    stack = reversible(model)
    model.model.layers[1].requires_grad_(False)
    assert all(".1." not in name and ("lora_" in name or "meft" in name) for name in gradients(model, stack, True))


def test_parameters_that_layers_share_get_the_sum() -> None:
    model = llama()
    stack = reversible(model)
    stack[1].meft.down = stack[0].meft.down
    stack[2].mlp = stack[0].mlp
    assert difference(gradients(model, stack, True), gradients(model, stack, False)) < 1e-9


def test_dropout_of_single_layers_in_training() -> None:
    model = llama(attention_dropout=0.3)
    stack = reversible(model, keep_every=3)
    model.eval()
    stack[1].train()
    model.config.use_cache = False
    assert difference(gradients(model, stack, True), gradients(model, stack, False)) < 1e-9


def test_frozen_layers_run_without_a_graph() -> None:
    model = llama()
    stack = reversible(model)
    model.requires_grad_(False)
    hidden = torch.randn(2, 12, 16, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, torch.arange(12)[None])
    assert not stack(hidden, position_embeddings=rotary).requires_grad


def test_gradients_accumulate_and_a_graph_may_be_kept() -> None:
    model = llama(attention_dropout=0.1)
    stack = reversible(model)
    once = gradients(model, stack, True)
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert difference(twice, {name: 2 * t for name, t in once.items()}) < 1e-12


def test_a_second_derivative_is_refused() -> None:
    model = llama()
    reversible(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    up = model.model.layers[0].meft.up
    (grad,) = torch.autograd.grad(loss, up, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_under_autocast() -> None:
    model = llama(dtype=torch.float32)
    stack = reversible(model)
    mine, stored = gradients(model, stack, True, autocast=True), gradients(model, stack, False, autocast=True)
    without = difference(stored, gradients(model, stack, False))
    assert difference(mine, stored) < 0.1 * without


def test_a_bfloat16_base_has_halves_and_adapters_of_float32() -> None:
    model = llama(6, torch.bfloat16)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules="all-linear"))
    stack = reversible(model, lora=False)
    assert stack[0].meft.down.dtype == torch.float32
    mine, stored = gradients(model, stack, True), gradients(model, stack, False)
    assert {t.dtype for t in mine.values()} == {torch.float32}
    assert difference(mine, stored) < 1e-2
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_cast_afterwards_trains_on(variant: int, dtype: torch.dtype) -> None:
    model = llama(dtype=torch.float32)
    reversible(model, variant=variant, adapter_size=4)
    model.to(dtype)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    adapter = model.model.layers[0].meft
    assert loss.isfinite() and adapter.up.grad.dtype == dtype and adapter.up.grad.any()


def test_inside_of_a_checkpoint() -> None:
    model = llama(attention_dropout=0.1)
    stack = reversible(model)
    expected = gradients(model, stack, True)
    model.zero_grad()
    torch.manual_seed(5)
    loss = torch.utils.checkpoint.checkpoint(
        lambda ids: model(input_ids=ids, labels=IDS).loss, IDS, use_reentrant=False
    )
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert difference(found, expected) < 1e-12


@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
def test_batches_of_any_size(shape: tuple[int, int]) -> None:
    model = llama()
    stack = reversible(model)
    ids = torch.ones(shape, dtype=torch.long)
    found = []
    for stack.recompute in (True, False):
        model.zero_grad()
        model.model(input_ids=ids).last_hidden_state.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, t in found[0].items():
        torch.testing.assert_close(t, found[1][name], rtol=1e-8, atol=1e-12)


def test_nan_reaches_the_gradients() -> None:
    model = llama()
    reversible(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].meft.up.grad.isnan().any()


# Caches


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_generation_is_the_same_with_and_without_a_cache(variant: int) -> None:
    model = llama(max_position_embeddings=64)
    reversible(model, variant=variant)
    model.eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(IDS, use_cache=True, **settings)
    assert with_cache.shape[1] == 20
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **settings))


def test_training_fills_no_cache_and_evaluation_does() -> None:
    model = llama()
    reversible(model)
    out = model(input_ids=IDS, labels=IDS, use_cache=True)
    out.loss.backward()
    assert model(input_ids=IDS, use_cache=True).past_key_values.get_seq_length() == 0
    model.eval()  # with gradients on: the layers are run once, their activations stored
    out = model(input_ids=IDS, use_cache=True)
    assert out.past_key_values.get_seq_length() == 12
    model.train()
    with pytest.raises(ValueError, match="expected no tokens in the cache"):
        model(input_ids=IDS[:, :1], past_key_values=out.past_key_values)


def test_checkpointed_layers_are_refused() -> None:
    model = llama()
    reversible(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(input_ids=IDS)


# The error of inverting


def test_the_error_grows_where_less_is_kept_and_check_bounds_it() -> None:
    errors = []
    for every in (1, 2, 3, 4):
        model = llama(8, torch.float32)
        stack = reversible(model, keep_every=every, check=1e9)
        gradients(model, stack, True)
        errors.append(stack.largest_error)
    assert errors[0] < 1e-6 and errors == sorted(errors) and errors[3] > 100 * errors[1]
    stack.check = errors[2]
    with pytest.raises(ValueError, match=r"relative error of .*, got .* keep_every below 4"):
        gradients(model, stack, True)


# In place, and back


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_undo_gives_the_model_back(architecture: str, variant: int) -> None:
    model = ARCHITECTURES[architecture]().eval()
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules="all-linear", dtype=torch.float64))
    off_the_start(model)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    logits, names = model(input_ids=IDS).logits, [name for name, _ in model.named_modules()]
    report = meft(model, MEFTConfig(variant=variant))
    off_the_start(model, (".meft.",))
    assert not torch.equal(model(input_ids=IDS).logits, logits)
    model.train()
    report.undo()
    assert all(module.training for module in model.modules())
    model.eval()
    assert [name for name, _ in model.named_modules()] == names
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(input_ids=IDS).logits, logits)
    meft(model)  # and once more


def test_the_report_and_the_names() -> None:
    model = llama()
    lk.adapt(model, lk.LoRAConfig(r=2))
    names = set(model.state_dict())
    report = meft(model, MEFTConfig(adapter_size=4))
    assert set(model.state_dict()) - names == {f"model.layers.{i}.meft.{n}" for i in range(3) for n in ("down", "up")}
    assert "MEFT1: 3 replaced" in str(report) and "adapter of 4" in str(report)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "meft" in repr(model) and len(model.model.layers) == 3


def test_it_starts_near_the_pretrained_model() -> None:
    """With λ and β toward 0, MEFT1 is the model, up to the scale that its last norm takes out."""
    model = llama(rms_norm_eps=1e-12).eval().requires_grad_(False)
    expected = model(input_ids=IDS).logits
    far = []
    for scale in (1e-1, 1e-3):
        report = meft(model, MEFTConfig(lam=scale, beta=scale))
        far.append(float((model(input_ids=IDS).logits - expected).norm() / expected.norm()))
        report.undo()
    assert far[1] < 2e-2 * far[0] < 2e-3


def test_a_copy_trains_by_itself() -> None:
    model = llama()
    stack = reversible(model)
    copied = copy.deepcopy(model)
    expected = gradients(model, stack, True)
    off_the_start(model)
    (copied_stack,) = (m for m in copied.modules() if isinstance(m, ReversibleStack))
    found = gradients(copied, copied_stack, True)
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def mixed() -> Any:
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 2}
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=1, num_hidden_layers=2, **kinds))


def t5() -> Any:
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2))


def vit() -> Any:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2, image_size=8, patch_size=4
        )
    )


def granite() -> Any:
    """Its layers have the children of Llama's, and multiply what they add to the residual."""
    return tf.GraniteForCausalLM(
        tf.GraniteConfig(**SIZES, num_key_value_heads=1, num_hidden_layers=2, residual_multiplier=0.5)
    )


def opt() -> Any:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )


def twice() -> Any:
    model = llama()
    meft(model)
    return model


@pytest.mark.parametrize(
    ("make", "variant", "words"),
    [
        (lambda: nn.Linear(4, 4), 1, "got a Linear, whose layers are not recognised"),
        (t5, 1, "found encoder.block, decoder.block"),
        (vit, 1, "runs on three tokens"),
        (mixed, 1, "layers that get the same arguments, got a Qwen2ForCausalLM"),
        (twice, 1, "reversible already"),
        (granite, 3, "outputs that differ by"),
        (opt, 3, "attention and MLP as in Llama, GPT-2 or BERT, got"),
    ],
)
def test_what_is_not_recognised_is_refused_and_left_as_it_was(
    make: Callable[[], Any], variant: int, words: str
) -> None:
    model = make().train()
    names, before = [name for name, _ in model.named_modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"meft: .*{words}"):
        meft(model, MEFTConfig(variant=variant))
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_granite_and_opt_are_taken_whole() -> None:
    for make in (granite, opt):
        meft(make(), MEFTConfig(variant=1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant": 4}, "expected variant 1, 2 or 3, got 4"),
        ({"variant": True}, "expected variant 1, 2 or 3, got True"),
        ({"variant": 2.0}, r"expected variant 1, 2 or 3, got 2\.0"),
        ({"lam": 0.0}, "expected lam to be finite and not 0"),
        ({"beta": 0}, "expected beta to be finite and not 0"),
        ({"beta": float("nan")}, "expected beta to be finite and not 0"),
        ({"keep_every": 0}, "expected keep_every to be an integer of at least 1"),
        ({"adapter_size": 1.5}, "expected adapter_size to be an integer of at least 1"),
        ({"check": True}, "expected check to be None or a positive number, got True"),
        ({"check": 0.0}, "expected check to be None or a positive number"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MEFTConfig(**settings)


def test_adapting_afterwards_leaves_the_adapters_training() -> None:
    model = llama()
    meft(model)
    lk.adapt(model, lk.LoRAConfig(r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or ".meft." in name}


def test_things_that_are_no_model_and_no_config() -> None:
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        meft("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected config to be a MEFTConfig"):
        meft(llama(), lk.LoRAConfig())  # type: ignore[arg-type]


# Files


@pytest.fixture
def trained() -> Iterator[Any]:
    model = llama(dtype=torch.float32)
    reversible(model, adapter_size=4, keep_every=3, lam=0.2)
    model.eval()
    yield model


@pytest.mark.parametrize("variant", [1, 3])
def test_what_is_saved_is_loaded_over_the_base(variant: int, tmp_path: Path) -> None:
    model = llama(dtype=torch.float32)
    reversible(model, variant=variant, adapter_size=4, keep_every=3, lam=0.2)
    save_meft(model.eval(), tmp_path)
    other = llama(dtype=torch.float32).eval()
    plain = other(input_ids=IDS).logits
    report = load_meft(other, tmp_path)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(p.requires_grad for p in other.parameters()) and report.trainable == 0
    assert other.model.layers.keep_every == 3
    report.undo()
    assert torch.equal(other(input_ids=IDS).logits, plain)
    assert all(p.requires_grad for p in other.parameters())
    load_meft(other, tmp_path, trainable=True)
    theirs, ours = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (other, model))
    assert theirs == ours


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1"),
        ("model.embed_tokens", "all but model.layers"),
        ("model.norm", "all but model.layers"),
        ("lm_head", "all but model.layers"),
    ],
)
def test_another_base_is_refused(changed: str, part: str, trained: Any, tmp_path: Path) -> None:
    save_meft(trained, tmp_path)
    other = llama(dtype=torch.float32)
    with torch.no_grad():
        other.get_submodule(changed).weight[-1] += 1e-3
    names = set(other.state_dict())
    with pytest.raises(ValueError, match=rf"expected the base that was trained over, got other .*: {part}"):
        load_meft(other, tmp_path)
    assert set(other.state_dict()) == names


def damaged_settings(folder: Path) -> None:
    file = folder / "meft_config.json"
    file.write_text(file.read_text().replace('"variant"', '"kind"'))


def zero_scale(folder: Path) -> None:
    file = folder / "meft_config.json"
    file.write_text(file.read_text().replace('"lam": 0.2', '"lam": 0.0'))


def other_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "meft.safetensors")
    tensors["more"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "meft.safetensors")


def not_finite(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "meft.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, folder / "meft.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_settings, "expected settings of meft"),
        (zero_scale, "expected lam to be finite and not 0"),
        (other_tensors, "expected the tensors"),
        (not_finite, "found NaN or Inf in"),
        (lambda folder: (folder / "meft.safetensors").write_bytes(b"123"), "safetensors header"),
        (lambda folder: (folder / "meft_config.json").unlink(), "expected meft_config.json in"),
        (lambda folder: (folder / "meft_config.json").write_text("{}"), "expected the format"),
    ],
)
def test_damaged_files_are_refused_and_leave_the_model(
    damage: Callable[[Path], Any], words: str, trained: Any, tmp_path: Path
) -> None:
    save_meft(trained, tmp_path)
    damage(tmp_path)
    other = llama(dtype=torch.float32)
    names = set(other.state_dict())
    with pytest.raises(ValueError, match=words):
        load_meft(other, tmp_path)
    assert set(other.state_dict()) == names and all(p.requires_grad for p in other.parameters())


def test_factors_that_an_earlier_save_left_in_the_folder_are_not_taken(trained: Any, tmp_path: Path) -> None:
    save_meft(trained, tmp_path)
    model = llama(dtype=torch.float32).requires_grad_(False)
    reversible(model, lora=False)
    save_meft(model.eval(), tmp_path)
    other = llama(dtype=torch.float32).eval()
    load_meft(other, tmp_path)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    save_meft(trained, tmp_path)
    with torch.no_grad():
        trained.model.layers[0].self_attn.q_proj.lora_A.weight.add_(1)
    lk.save_adapter(trained, tmp_path)
    with pytest.raises(ValueError, match=r"expected the adapter_model\.safetensors that was saved with meft"):
        load_meft(llama(dtype=torch.float32), tmp_path)


def test_merged_layers_are_not_saved(trained: Any, tmp_path: Path) -> None:
    layer = trained.model.layers[1].self_attn.q_proj
    layer.merge_()
    with pytest.raises(ValueError, match=r"expected unmerged layers, got merged ones, model\.layers\.1.*unmerge_"):
        save_meft(trained, tmp_path)
    assert not list(tmp_path.iterdir())
    layer.unmerge_()
    save_meft(trained, tmp_path)


def test_factors_of_pefts_are_not_left_out_in_silence(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama(dtype=torch.float32)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    meft(model)
    for trains in (True, False):
        model.requires_grad_(trains)
        with pytest.raises(ValueError, match=r"expected LoRA factors of lk\.adapt, got others, model\.layers\.0"):
            save_meft(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_side_path_is_not_made_reversible() -> None:
    model = llama()
    lk.side.sherl(model, lk.side.SHERLConfig(1, 4))
    with pytest.raises(ValueError, match="expected the model's own layers, got a SideStack in their place; call undo"):
        meft(model)


def test_what_cannot_be_saved(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a model that lk\.reversible\.meft made"):
        save_meft(llama(), tmp_path)
    trained.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"to train, got model\.norm\.weight"):
        save_meft(trained, tmp_path)
    trained.model.norm.weight.requires_grad_(False)
    with torch.no_grad():
        trained.model.layers[0].meft.up[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"found NaN or Inf in model\.layers\.0\.meft\.up"):
        save_meft(trained, tmp_path)
    assert not list(tmp_path.iterdir())
