"""SoRA: the proximal step against its closed form, cutting, going on, and what is refused."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.allocate import ALoRA, HeteroLoRA, SoRA, rising, soft_threshold, sora_groups

R = 6


def make(kind=lk.LoRAConfig, r=R, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    lk.adapt(model, kind(r=r, alpha=2.0 * r, gate=True))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_B.weight.normal_(std=0.3)
    return model


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 12, generator=generator), torch.randn(32, 8, generator=generator)


def train(model, optimizer, steps, schedule=None):
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def adamw(model, gate_lr=0.5):
    return torch.optim.AdamW(sora_groups(model, 1e-2, gate_lr))


def test_soft_threshold():
    values = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    assert torch.equal(soft_threshold(values, 1.0), torch.tensor([-2.0, 0.0, 0.0, 0.0, 2.0]))


def test_gates_reach_the_closed_form_on_a_quadratic():
    """min ½ Σ h_i (g_i - c_i)² + λ |g_i| is at sign(c_i) max(|c_i| - λ / h_i, 0)."""
    model = nn.Sequential(nn.Linear(4, 4))
    lk.adapt(model, lk.LoRAConfig(r=4, gate=True))
    gate, penalty = model[0].lora_gate, 0.3
    h, c = torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([1.0, -0.5, 0.5, 0.2])
    optimizer = torch.optim.AdamW(sora_groups(model, 1e-3, 0.5))
    SoRA(model, optimizer, penalty)
    for _ in range(200):
        gate.grad = h * (gate.detach() - c)
        optimizer.step()
    expected = c.sign() * (c.abs() - penalty / h).clamp_min(0.0)
    torch.testing.assert_close(gate.detach(), expected, rtol=1e-6, atol=1e-6)
    assert int(gate.count_nonzero()) == 2


def test_one_step_is_the_formula_at_the_groups_rate_of_that_step():
    model = make()
    optimizer = adamw(model, 0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    SoRA(model, optimizer, lambda step: 0.1 * (1 + step))
    for step, rate, penalty in ((0, 0.4, 0.1), (1, 0.2, 0.2)):
        x, y = data()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        before = [layer.lora_gate.detach().clone() for layer in (model[0], model[2])]
        grads = [layer.lora_gate.grad.clone() for layer in (model[0], model[2])]
        optimizer.step()
        schedule.step()
        for layer, gate, grad in zip((model[0], model[2]), before, grads, strict=True):
            assert torch.equal(layer.lora_gate.detach(), soft_threshold(gate - rate * grad, rate * penalty)), step
            assert torch.equal(layer.lora_gate.grad, grad)  # as it was, after the step
    assert not any(layer.lora_gate in optimizer.state for layer in (model[0], model[2]))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.AdamW])
def test_any_optimizer_steps_the_factors_and_not_the_gates(optimizer):
    gated, plain = make(), make()
    of_gated, of_plain = optimizer(sora_groups(gated, 1e-2, 0.1)), optimizer(sora_groups(plain, 1e-2, 0.1))
    SoRA(gated, of_gated, 0.1)
    for layer in (plain[0], plain[2]):
        layer.lora_gate.requires_grad_(False)
    train(gated, of_gated, 1)
    train(plain, of_plain, 1)
    for name, p in gated.named_parameters():
        assert torch.equal(p, plain.get_parameter(name)) == ("gate" not in name), name


@pytest.mark.parametrize("kind", [lk.LoRAConfig, lk.DoRAConfig])
def test_cut_ranks_change_nothing(kind):
    model = make(kind)
    optimizer = adamw(model)
    sora = SoRA(model, optimizer, 0.1)
    train(model, optimizer, 30)
    kept = sora.kept()
    assert 0 < sum(kept.values()) < 2 * R
    x, _ = data()
    y = model(x)
    scalings = [layer.scaling for layer in (model[0], model[2])]
    ranks = sora.prune()
    assert ranks == {path: max(1, count) for path, count in kept.items()}
    assert {path: model.get_submodule(path).r for path in ranks} == ranks
    assert torch.equal(model(x), y) if kind is lk.LoRAConfig else torch.allclose(model(x), y, rtol=1e-6, atol=1e-6)
    assert [layer.scaling for layer in (model[0], model[2])] == pytest.approx(scalings, rel=1e-15)
    train(model, optimizer, 2)  # goes on, with the optimizer's state of what is left
    a = model[0].lora_A.weight
    assert optimizer.state[a]["exp_avg"].shape == a.shape and int(optimizer.state[a]["step"]) == 32


def test_cut_ranks_are_exact_in_float32():
    model = make()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_gate.copy_(torch.tensor([0.0, 1.5, 0.0, 0.0, -0.5, 0.0]))
    x, _ = data()
    y = model(x)
    SoRA(model, adamw(model), 0.1).prune()
    assert model[0].r == model[2].r == 2
    assert torch.equal(model(x), y)


def test_a_cut_model_is_saved_and_loaded(tmp_path):
    model = make()
    optimizer = adamw(model)
    sora = SoRA(model, optimizer, 0.1)
    train(model, optimizer, 30)
    sora.prune()
    lk.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    lk.load_adapter(loaded, tmp_path)
    x, _ = data()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert [loaded[i].r for i in (0, 2)] == [model[i].r for i in (0, 2)]


def test_a_layer_without_a_gate_left_keeps_one_rank():
    model = make()
    sora = SoRA(model, adamw(model), 0.1)
    with torch.no_grad():
        model[0].lora_gate.zero_()
    x, _ = data()
    y = model(x)
    assert sora.prune() == {"0": 1, "2": R}
    assert torch.equal(model(x), y)


def _saved(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("cut", [False, True])
def test_it_goes_on_bit_for_bit(cut):
    def start():
        model = make()
        optimizer = adamw(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step / 10))
        return model, optimizer, SoRA(model, optimizer, rising(0.1, 0.6, 20), note_every=2), schedule

    model, optimizer, sora, schedule = start()
    train(model, optimizer, 15, schedule)
    if cut:
        sora.prune()
    state = _saved(model, optimizer, schedule)
    train(model, optimizer, 5, schedule)
    again, other, resumed, schedule = start()
    for part, saved in zip((again, other, schedule), state, strict=True):
        part.load_state_dict(saved)
    assert resumed.steps == 15
    train(again, other, 5, schedule)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    assert resumed.history == sora.history and len(sora.history["steps"]) > 1
    assert [layer.scaling for layer in (model[0], model[2])] == [layer.scaling for layer in (again[0], again[2])]


def test_a_penalty_rises():
    penalty = rising(0.1, 0.5, 4)
    assert [penalty(i) for i in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    for wrong in ((-1.0, 1.0, 3), (0.0, math.inf, 3), (0.0, 1.0, 0)):
        with pytest.raises(ValueError, match="rising: expected"):
            rising(*wrong)


def test_what_is_refused():
    model = make()
    optimizer = adamw(model)
    for penalty, error in ((-1.0, ValueError), (math.nan, ValueError), ("a", TypeError), (True, TypeError)):
        with pytest.raises(error, match="penalty"):
            SoRA(model, optimizer, penalty)
    without = torch.optim.AdamW(p for n, p in model.named_parameters() if "gate" not in n and p.requires_grad)
    with pytest.raises(ValueError, match="without that of 0"):
        SoRA(model, without, 0.1)
    plain = nn.Sequential(nn.Linear(12, 16))
    with pytest.raises(ValueError, match="found none"):
        SoRA(plain, optimizer, 0.1)
    lk.adapt(plain, lk.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="expected layers with a gate, got none in 0"):
        SoRA(plain, optimizer, 0.1)
    SoRA(model, optimizer, 0.1)
    with pytest.raises(ValueError, match="has one"):
        SoRA(model, optimizer, 0.1)


def test_pefts_layers_have_no_gate():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 16)), peft.LoraConfig(r=2, target_modules=["0"]))
    lk.integrations.peft.accelerate(model)
    with pytest.raises(ValueError, match=r"with a gate, got a \w+ in .*, which has none; adapt"):
        sora_groups(model, 1e-2, 1e-1)


def test_a_gate_that_is_not_finite_is_not_cut():
    model = make()
    sora = SoRA(model, adamw(model), 0.1)
    with torch.no_grad():
        model[0].lora_gate.zero_()
        model[2].lora_gate[1] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN or Inf in 2; nothing was cut"):
        sora.prune()
    assert all(t.shape == before[name].shape for name, t in model.state_dict().items())


def test_it_goes_on_where_the_optimizers_state_is_loaded_before_the_models():
    model = make()
    optimizer = adamw(model)
    sora = SoRA(model, optimizer, 0.1)
    train(model, optimizer, 30)
    sora.prune()
    state = _saved(model, optimizer)
    train(model, optimizer, 3)
    again = make()
    other = adamw(again)
    SoRA(again, other, 0.1)
    other.load_state_dict(state[1])
    again.load_state_dict(state[0])
    train(again, other, 3)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


def test_a_copy_has_no_optimizer_and_still_loads_other_ranks():
    model = make()
    alone = len(pickle.dumps(model))
    optimizer = adamw(model)
    sora = SoRA(model, optimizer, 0.1)
    train(model, optimizer, 30)
    assert len(pickle.dumps(model)) < alone + 1000  # moments would be 5 KB
    twin = copy.deepcopy(model)
    sora.prune()
    twin.load_state_dict(model.state_dict())
    x, _ = data()
    assert torch.equal(twin(x), model(x))
    sora.detach()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(make().state_dict())


def test_the_config_of_a_part_that_was_adapted_follows(tmp_path):
    whole = nn.Module()
    whole.part = make()
    sora = SoRA(whole, torch.optim.AdamW(sora_groups(whole, 1e-2, 0.5)), 0.1)
    with torch.no_grad():
        whole.part[0].lora_gate[2:] = 0.0
    assert sora.prune() == {"part.0": 2, "part.2": R}
    lk.save_adapter(whole.part, tmp_path)
    torch.manual_seed(0)
    loaded = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    lk.load_adapter(loaded, tmp_path)
    x, _ = data()
    torch.testing.assert_close(loaded(x), whole.part(x), rtol=1e-5, atol=1e-5)


def test_riders_that_set_gates_do_not_share_an_optimizer():
    model = make()
    optimizer = adamw(model)
    sora = SoRA(model, optimizer, 0.1)
    for make_other in (
        lambda: ALoRA(model, optimizer, [data()], lambda m, b: 0.0, every=1, moves=1),
        lambda: HeteroLoRA(model, optimizer, [data()], lambda m, b: 0.0, budget=0.6),
    ):
        with pytest.raises(ValueError, match=r"another rider that sets gates, got one with sora; call its detach\(\)"):
            make_other()
    assert all(layer.lora_gate.requires_grad for layer in (model[0], model[2]))
    sora.detach()
    ALoRA(model, optimizer, [data()], lambda m, b: 0.0, every=1, moves=1)


def test_an_optimizer_that_maximises_has_gates_that_do_too():
    found = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        model = make()
        optimizer = torch.optim.AdamW(sora_groups(model, 1e-2, 0.5), maximize=maximize)
        SoRA(model, optimizer, 0.01)
        x, y = data()
        for _ in range(3):
            optimizer.zero_grad()
            (sign * (model(x) - y).square().mean()).backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
