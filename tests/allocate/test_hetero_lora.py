"""HeteroLoRA: scores, the budget, switching, going on, shortcuts, and what is refused."""

import io
import itertools
import math

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.allocate import HeteroLoRA, add_shortcuts_

R = 2
PROXIES = ("grad_norm", "snip", "synflow")


def mean_square(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def make(widths=(8, 8, 8, 8, 8), kind=lk.LoRAConfig):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(widths)))
    lk.adapt(model, kind(r=R, alpha=float(R), gate=True))
    with torch.no_grad():
        for layer in model:
            layer.lora_B.weight.normal_(std=0.3)
    return model


def batches(n=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)) for _ in range(n)]


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def ones(model):
    return model(torch.ones(1, 8))


def allocator(model, optimizer, **settings):
    settings = {"budget": 0.5, "warmup": 2, "outputs": ones, **settings}
    return HeteroLoRA(model, optimizer, batches(), mean_square, **settings)


def train(model, optimizer, steps):
    x, y = batches(1, seed=2)[0]
    for _ in range(steps):
        loss = mean_square(model, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def dense(model, x, absolute=False):
    """(output, {path: (A, B)}) of the plain formula in float64, the factors with gradients."""
    factors, x = {}, x.double()
    size = torch.abs if absolute else (lambda t: t)
    for path, layer in model.named_children():
        a, b = (size(p.detach().double()).requires_grad_() for p in layer.factor_parameters())
        w, bias = (size(t.detach().double()) for t in (layer.weight, layer.bias))
        x = x @ (w + layer.scaling * b @ a).T + bias
        factors[path] = a, b
    return x, factors


@pytest.mark.parametrize("proxy", PROXIES)
def test_scores_are_the_formulas(proxy):
    model = make()
    hetero = allocator(model, adamw(model), proxy=proxy)
    if proxy == "synflow":
        y, factors = dense(model, torch.ones(1, 8), absolute=True)
        y.sum().backward()
        expected = {path: sum(float((p * p.grad).sum()) for p in pair) for path, pair in factors.items()}
    else:
        sums = {path: [0.0, 0.0] for path in hetero.layers}
        for x, y in hetero.batches:
            out, factors = dense(model, x)
            ((out - y).square().mean() / len(hetero.batches)).backward()
            for path, pair in factors.items():
                sums[path] = [total + p.grad for total, p in zip(sums[path], pair, strict=True)]
        if proxy == "grad_norm":
            expected = {path: math.sqrt(sum(float(g.square().sum()) for g in pair)) for path, pair in sums.items()}
        else:
            expected = {
                path: sum(float((p * g).abs().sum()) for p, g in zip(factors[path], pair, strict=True))
                for path, pair in sums.items()
            }
    assert hetero.scores() == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_planted_module_wins(proxy):
    """Module 2 alone has a large B."""
    model = make()
    with torch.no_grad():
        for path, layer in model.named_children():
            layer.lora_B.weight.mul_(10.0 if path == "2" else 0.01)
    hetero = allocator(model, adamw(model), proxy=proxy, budget=0.25)
    assert hetero.choose() == ["2"]


def test_the_budget_is_held_and_filled():
    model = make((8, 4, 16, 8, 8))
    hetero = allocator(model, adamw(model))
    for budget in (min(hetero.sizes.values()), 50, 100, sum(hetero.sizes.values())):
        hetero.budget = budget
        on = hetero.choose()
        spent = sum(hetero.sizes[path] for path in on)
        assert spent <= budget
        assert all(spent + size > budget for path, size in hetero.sizes.items() if path not in on)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == spent


def test_what_is_off_keeps_its_values_and_adds_nothing():
    model = make()
    optimizer = adamw(model)
    hetero = allocator(model, optimizer)
    train(model, optimizer, 2)
    off = [path for path in hetero.layers if path not in hetero.enabled]
    assert len(off) == len(hetero.enabled) == 2
    before = {path: [p.detach().clone() for p in hetero.layers[path].factor_parameters()] for path in off}
    train(model, optimizer, 5)
    for path in off:
        layer = hetero.layers[path]
        assert all(map(torch.equal, before[path], layer.factor_parameters()))
        x = torch.randn(3, 8)
        torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-6, atol=1e-6)
    assert all(layer.lora_gate.tolist() == [1.0] * R for path, layer in hetero.layers.items() if path not in off)


@pytest.mark.parametrize("kind", [lk.LoRAConfig, lk.DoRAConfig])
def test_switching_changes_no_enabled_modules_function(kind):
    model = make(kind=kind)
    optimizer = adamw(model)
    hetero = allocator(model, optimizer, every=1)
    x = torch.randn(3, 8)
    train(model, optimizer, 2)
    for on in (["0", "1"], ["1", "3"], ["2", "3"]):
        stays = set(on) & set(hetero.enabled)
        before = {path: hetero.layers[path](x) for path in stays}
        hetero._turn(on)
        assert all(torch.equal(hetero.layers[path](x), before[path]) for path in stays)
    train(model, optimizer, 3)
    assert len(hetero.enabled) == 2 and hetero.history["steps"][0] == 3


@pytest.mark.parametrize("every", [None, 3])
def test_it_goes_on_bit_for_bit(every):
    def start():
        model = make()
        optimizer = adamw(model)
        return model, optimizer, allocator(model, optimizer, every=every, proxy="snip")

    model, optimizer, hetero = start()
    train(model, optimizer, 6)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    train(model, optimizer, 6)
    again, other, resumed = start()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    train(again, other, 6)
    assert (resumed.enabled, resumed.history) == (hetero.enabled, hetero.history)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)) and p.requires_grad == again.get_parameter(name).requires_grad


def test_a_pruned_model_has_the_enabled_layers_alone(tmp_path):
    model = make()
    optimizer = adamw(model)
    hetero = allocator(model, optimizer)
    train(model, optimizer, 4)
    x = torch.randn(3, 8)
    y = model(x)
    assert hetero.prune() == [path for path, m in model.named_children() if hasattr(m, "base_layer")]
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    lk.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    report = lk.load_adapter(plain, tmp_path)
    assert len(report.replaced) == 2
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)


def test_scoring_leaves_everything_as_it_was():
    model = make().train()
    model[1].eval()
    hetero = allocator(model, adamw(model), proxy="synflow")
    hetero._turn(["0", "2"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    for proxy in PROXIES:
        hetero.proxy = proxy
        hetero.scores()
    assert hetero.enabled == ["0", "2"] and not model[1].training and model[0].training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu()), None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mlp = nn.Linear(8, 8), Block()

    def forward(self, x):
        x = self.first(x)
        return x + self.mlp(x)[0]


def test_shortcuts_are_linears_of_their_own(tmp_path):
    def start():
        torch.manual_seed(0)
        model = Model()
        return model, add_shortcuts_(model, ["mlp"])

    model, paths = start()
    x = torch.randn(3, 8)
    plain = Model()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "shortcut" not in k})
    assert paths == ["mlp.shortcut"] and torch.equal(model(x), plain(x))
    lk.adapt(model, lk.LoRAConfig(r=R, gate=True))
    assert torch.allclose(model(x), plain(x))
    optimizer = adamw(model)
    hetero = allocator(model, optimizer, budget=0.4, warmup=1)
    train(model, optimizer, 3)
    with torch.no_grad():
        layer = model.mlp.shortcut
        layer.lora_B.weight.normal_()
        layer.lora_gate.fill_(1.0)
        inner = model.first(x)
        expected = inner + model.mlp.down(model.mlp.up(inner).relu()) + layer(inner)
        torch.testing.assert_close(model(x), expected)
    hetero.detach()
    lk.save_adapter(model, tmp_path)
    other, _ = start()
    lk.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no shortcut yet in mlp"):
        add_shortcuts_(model, ["mlp"])
    with pytest.raises(ValueError, match="modules named attention, found none"):
        add_shortcuts_(model, ["attention"])


def test_what_is_refused():
    model = make()
    optimizer = adamw(model)
    for budget in (0, 0.0, -1, 1.5, 10**9, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a budget of 32, the smallest module, to 128 parameters"):
            allocator(model, optimizer, budget=budget)
    for budget in ("half", True, None):
        with pytest.raises(TypeError, match="budget"):
            allocator(model, optimizer, budget=budget)
    with pytest.raises(ValueError, match="proxy to be one of grad_norm, snip, synflow"):
        allocator(model, optimizer, proxy="fisher")
    for settings in ({"warmup": 0}, {"every": 0}, {"warmup": None}, {"every": 1.5}):
        with pytest.raises(ValueError, match=f"expected {next(iter(settings))} to be an integer"):
            allocator(model, optimizer, **settings)
    with pytest.raises(ValueError, match="expected batches to score by, got none"):
        HeteroLoRA(model, optimizer, [], mean_square, budget=0.5)
    few = torch.optim.SGD([model[0].lora_A.weight], lr=0.1)
    with pytest.raises(ValueError, match="without those of 0"):
        allocator(model, few)
    ungated = nn.Sequential(nn.Linear(8, 8))
    lk.adapt(ungated, lk.LoRAConfig(r=R))
    with pytest.raises(ValueError, match="expected layers with a gate, got none in 0"):
        allocator(ungated, adamw(ungated))
    with pytest.raises(ValueError, match="expected outputs, a function that calls this Sequential"):
        allocator(model, optimizer, proxy="synflow", outputs=None).scores()


@pytest.mark.parametrize("proxy", ["snip", "synflow"])
def test_scores_of_nothing_choose_nothing(proxy):
    model = make()
    with torch.no_grad():
        for layer in model:
            layer.lora_A.weight.zero_()
            layer.lora_B.weight.zero_()
    hetero = allocator(model, adamw(model), proxy=proxy)
    with pytest.raises(ValueError, match=f"got {proxy} of 0 for all; score after a warm-up"):
        hetero.choose()
    assert len(hetero.enabled) == 4


def test_scores_that_are_not_finite_choose_nothing():
    model = make()
    hetero = HeteroLoRA(model, adamw(model), batches(), lambda m, b: mean_square(m, b) * math.nan, budget=0.5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="finite scores, got nan of 0; nothing has changed"):
        hetero.choose()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and len(hetero.enabled) == 4


def test_trained_gates_are_put_into_b_and_what_was_off_keeps_its_values():
    model = make()
    with torch.no_grad():
        model[0].lora_gate.copy_(torch.tensor([0.5, -2.0]))
        b = model[1].lora_B.weight.clone()
        x, _ = batches(1)[0]
        y = model(x)
        model[1].lora_gate.zero_()
        allocator(model, adamw(model))
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
        assert torch.equal(model[1].lora_B.weight, b)


def test_the_config_of_a_part_that_was_adapted_names_what_is_left(tmp_path):
    whole = nn.Module()
    whole.part = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.adapt(whole.part, lk.LoRAConfig(r=R, gate=True, target_modules=["0", "1"]))
    hetero = HeteroLoRA(whole, adamw(whole), batches(), lambda m, b: mean_square(m.part, b), budget=0.5)
    hetero.choose()
    (path,) = hetero.prune()
    lk.save_adapter(whole.part, tmp_path)
    assert [r.name for r in lk.load_adapter(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tmp_path).replaced] == [
        path.removeprefix("part.")
    ]


class _Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(64, 64)

    def forward(self, x):
        return self.up_proj(x)


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = _Mlp()

    def forward(self, x):
        return self.mlp(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shortcuts_around_weights_of_few_bits(dtype):
    model = _Layer().to(dtype)
    lk.quantize_(model, "nf4")
    x = torch.randn(3, 64, dtype=dtype)
    y = model(x)
    assert add_shortcuts_(model) == ["mlp.shortcut"]
    assert model.mlp.shortcut.weight.dtype == dtype and torch.equal(model(x), y)


def test_shortcuts_of_a_model_that_was_compiled_and_called_before():
    model = _Layer()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 64)
    compiled(x)
    add_shortcuts_(model)
    nn.init.normal_(model.mlp.shortcut.weight)
    torch.testing.assert_close(compiled(x), model(x))


def test_synflow_refuses_weights_of_few_bits():
    model = _Layer()
    lk.quantize_(model, "nf4")
    lk.adapt(model, lk.LoRAConfig(r=R, gate=True))
    with pytest.raises(ValueError, match=r"dense weights for proxy='synflow', .* got nf4 in mlp\.up_proj"):
        HeteroLoRA(model, adamw(model), [], mean_square, budget=1.0, proxy="synflow", outputs=ones)


def test_a_layer_that_is_off_leaves_every_place_it_has():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, shared, nn.Linear(8, 8))
    lk.adapt(model, lk.LoRAConfig(r=R, gate=True))
    hetero = allocator(model, adamw(model))
    hetero._turn(["2"])
    hetero.prune()
    assert model[0] is shared and model[1] is shared and isinstance(model[2], lk.nn.LoRALinear)
