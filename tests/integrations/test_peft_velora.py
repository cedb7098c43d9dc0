"""accelerate on adapters with PEFT's velora_config: PEFT's outputs, gradients and vectors, and fewer bytes."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from torch import nn

from lowrank_kernels.integrations.peft import AcceleratedLinear, accelerate
from tests.integrations.beside_peft import TARGETS, assert_agrees, assert_close, calls_of, run
from tests.tiny_llama import randomise

ONCE = "batch_average_once"


def make(llama, dtype=torch.float32, groups=4, init="batch_average", scale=1.0, **settings):
    velora = VeloraConfig(num_groups=groups, init_type=init, scale=scale)
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "velora_config": velora, **settings})
    return randomise(get_peft_model(llama(dtype), config), size=0.1)


def pair(llama, **settings):
    theirs = make(llama, **settings).train()
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert len(report.replaced) == 6 and not report.skipped
    return ours, theirs


def vectors(model):
    return {name: v for name, v in model.state_dict().items() if "velora" in name}


SETTINGS = {
    "default": {},
    "once": {"init": ONCE},
    "random": {"init": "random"},
    "one group": {"groups": 1},
    "sixteen": {"groups": 16},
    "scale": {"scale": 2.5, "init": ONCE},
    "rslora, bias": {"use_rslora": True, "lora_bias": True, "bias": "lora_only"},
    "frozen bias": {"bias": "none", "r": 3},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_outputs_gradients_and_vectors_are_pefts(llama, tokens, kind):
    ours, theirs = pair(llama, **SETTINGS[kind])
    for batch in (tokens, tokens.flip(0)[:, :3]):
        with calls_of("lora_linear") as op:
            run(ours, batch)
        assert op.call_count == 6
        run(theirs, batch)
        assert_agrees(ours, theirs, batch)
        for name, v in vectors(theirs).items():
            assert_close(vectors(ours)[name], v, 1e-6, name)


def test_the_gradient_of_a_is_not_the_exact_one(llama, tokens):
    """Else the test above would show nothing."""
    ours, _ = pair(llama)
    compressed, exact = run(ours, tokens)[1], run(ours.eval(), tokens)[1]
    for name, g in exact.items():
        same = torch.allclose(compressed[name], g, rtol=1e-3, atol=1e-5)
        assert same == ("lora_A" not in name), name


def test_in_evaluation_it_is_pefts_exact_gradient_and_no_vector_is_made(llama, tokens):
    ours, theirs = pair(llama, init=ONCE)
    assert_agrees(ours.eval(), theirs.eval(), tokens)
    assert not any(v.any() for v in vectors(ours).values())


@pytest.mark.parametrize("init", ["batch_average", ONCE])
def test_over_bfloat16_it_is_as_near_to_float32_as_peft(llama, tokens, init):
    """PEFT widens x to float32 and saves z so; here x and z are bfloat16."""
    ours, theirs = pair(llama, dtype=torch.bfloat16, init=init)
    exact = copy.deepcopy(theirs).float()
    (_, grads), (_, expected), (_, true) = (run(model, tokens) for model in (ours, theirs, exact))
    for name, g in true.items():
        assert grads[name].dtype == expected[name].dtype
        assert (grads[name] - g).norm() <= 2 * (expected[name] - g).norm() + 0.01 * g.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(llama, tokens, reentrant):
    ours, theirs = pair(llama, init=ONCE)
    for model in (ours, theirs):
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_agrees(ours, theirs, tokens)


def test_one_vector_for_both_parts_of_an_accumulated_gradient(llama, tokens):
    ours, theirs = pair(llama, init=ONCE)
    for model in (ours, theirs):
        for part in (tokens, tokens.flip(0)):
            (model(part).logits.float().sin().sum() * 0.1).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            assert_close(p.grad, q.grad, 2e-5, name)


def test_groups_that_do_not_divide_are_left_to_peft_and_listed(llama, tokens):
    theirs = make(llama, groups=5)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert not report.replaced
    assert all("VeLoRA with 5 groups, which do not divide K = " in s.reason for s in report.skipped)
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_beside_an_ordinary_adapter_each_runs_on_the_op_and_both_together_on_pefts_forward(llama, tokens):
    theirs = make(llama).train()
    theirs.add_adapter("plain", LoraConfig(r=2, target_modules=TARGETS))
    randomise(theirs)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for active, calls in (("default", 6), ("plain", 6), (["default", "plain"], 0)):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        with calls_of("lora_linear") as op:
            run(ours, tokens)
        assert op.call_count == calls
        assert_agrees(ours, theirs, tokens)


def single(init, **settings):
    torch.manual_seed(0)
    velora = VeloraConfig(num_groups=4, init_type=init)
    config = LoraConfig(r=2, target_modules=["0"], velora_config=velora, **settings)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3)), config).train()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B.default.weight)
    return model, layer


def test_a_batch_without_a_finite_mean_makes_no_vector():
    """PEFT's own vector is NaN for good after such a first batch."""
    theirs, their_layer = single(ONCE)
    ours, layer = single(ONCE)
    accelerate(ours)
    x = torch.randn(5, 12)
    for bad in (torch.full((2, 12), float("nan")), torch.zeros(0, 12)):
        ours(bad).sum().backward()
        assert not layer.lora_velora_initialized["default"]
    theirs(torch.zeros(0, 12))
    theirs(x)
    assert their_layer.lora_velora_embed["default"].isnan().all()
    ours(x)
    torch.testing.assert_close(layer.lora_velora_embed["default"].norm(), torch.tensor(1.0))


def test_dropout_compresses_what_a_is_multiplied_with():
    """The mean of the gradient over many masks is that without dropout: 1 / (1 - p) is in z."""
    model, layer = single("random", lora_dropout=0.5)
    accelerate(model)
    x, dy = torch.randn(6, 12), torch.randn(6, 10)

    def grad():
        return torch.autograd.grad(layer(x), layer.lora_A.default.weight, dy)[0]

    torch.manual_seed(1)
    found = torch.stack([grad() for _ in range(400)])
    layer.lora_dropout["default"] = nn.Identity()
    expected, error = grad(), found.std(0) / 20
    assert ((found.mean(0) - expected).abs() < 5 * error + 1e-6).all() and error.max() > 0.01


def test_saved_bytes_fall_by_x_alone():
    kept = {}

    def saved(layer, x):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            layer(x)
        return [t.shape for t in seen.values()]

    for accelerated in (False, True):
        model, layer = single(ONCE)
        if accelerated:
            accelerate(model)
            assert isinstance(layer, AcceleratedLinear)
        kept[accelerated] = saved(layer, torch.randn(7, 12, requires_grad=True))
    for shapes in kept.values():
        assert (7, 12) not in shapes and shapes.count((7, 4)) == 1 and shapes.count((7, 2)) == 1  # z and P


def test_peft_keeps_its_vector_through_saving_and_makes_another_at_the_next_batch(tmp_path):
    """That it was made once is no part of the file; an accelerated model does as PEFT does."""
    ours, layer = single(ONCE)
    accelerate(ours)
    ours(torch.randn(5, 12)).sum().backward()
    made = layer.lora_velora_embed["default"].clone()
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3)), tmp_path, is_trainable=True)
    loaded = again.base_model.model[0]
    assert torch.equal(loaded.lora_velora_embed["default"], made)
    again.train()(torch.randn(5, 12))
    assert not torch.allclose(loaded.lora_velora_embed["default"], made)
