"""ALoRA: what it finds, what it conserves, going on, and what is refused."""

import io
import math

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.allocate import ALoRA

R = 4


def mean_square(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def make(kind=lk.LoRAConfig, layers=3, r=R):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    lk.adapt(model, kind(r=r, alpha=float(r), gate=True))
    with torch.no_grad():
        for layer in model:
            layer.lora_B.weight.normal_(std=0.3)
    return model


def batches(n=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)) for _ in range(n)]


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def allocator(model, optimizer, **settings):
    return ALoRA(model, optimizer, batches(), mean_square, **{"every": 5, "moves": 3, **settings})


def train(model, optimizer, steps):
    """With the last step's loss alive at the next, as in most loops."""
    x, y = batches(1, seed=2)[0]
    for _ in range(steps):
        loss = mean_square(model, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_importance_is_the_papers_formula():
    model = make(layers=2, r=2)
    alora = allocator(model, adamw(model), moves=1)
    found = alora.importance()
    assert all(torch.equal(layer.lora_gate, torch.ones(2)) for layer in model)

    def score(*gates):
        loss = 0.0
        for x, y in alora.batches:
            for layer, gate in zip(model, gates, strict=True):
                full = layer.lora_B.weight * torch.tensor(gate) @ layer.lora_A.weight
                x = x @ (layer.weight + layer.scaling * full).T + layer.bias
            loss += float((x - y).square().mean().detach())
        return -loss / len(alora.batches)

    on, off = (1.0, 1.0), ((0.0, 1.0), (1.0, 0.0))
    none = (0.0, 0.0)
    for path, place in (("0", lambda g, other: (g, other)), ("1", lambda g, other: (other, g))):
        expected = [score(on, on) - score(*place(off[r], on)) + score(*place(off[1 - r], none)) for r in (0, 1)]
        assert found[path] == pytest.approx(expected, rel=1e-5)


def test_a_useless_rank_is_cut_and_a_needed_layer_grows():
    """Rank 2 of layer 0 adds noise; layer 2 alone is what the target differs by."""
    model = make()
    with torch.no_grad():
        for layer in model:
            layer.lora_B.weight.zero_()
        model[0].lora_B.weight[:, 2] = 2.0
        target = [(x, model[1](x @ model[0].weight.T + model[0].bias)) for x, _ in batches()]
        model[2].lora_B.weight.normal_()
        target = [(x, model[2](hidden)) for x, hidden in target]
    alora = ALoRA(model, adamw(model), target, mean_square, every=1, moves=1)
    importance = alora.importance()
    assert min((v, p, r) for p, values in importance.items() for r, v in enumerate(values))[1:] == ("0", 2)
    kept = model[0].lora_A.weight.detach()[[0, 1, 3]].clone()
    assert alora.reallocate() == {"0": R - 1, "1": R, "2": R + 1}
    assert torch.equal(model[0].lora_A.weight, kept)
    assert not model[2].lora_B.weight[:, -1].any() and model[2].lora_A.weight[-1].any()


@pytest.mark.parametrize("kind", [lk.LoRAConfig, lk.DoRAConfig])
def test_a_reallocation_changes_the_function_by_what_was_cut_alone(kind):
    model = make(kind)
    alora = allocator(model, adamw(model))
    cut = alora._lowest(alora.importance())
    assert sum(map(len, cut.values())) == 3
    x = torch.randn(4, 16)
    with torch.no_grad():
        for path, ranks in cut.items():
            model.get_submodule(path).lora_gate[list(ranks)] = 0.0
        expected = model(x)
        for layer in model:
            layer.lora_gate.fill_(1.0)
        alora.reallocate()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_the_budget_never_changes_and_a_layer_keeps_a_rank():
    model = make(r=2)
    optimizer = adamw(model)
    alora = allocator(model, optimizer, every=1, moves=3)
    for _ in range(6):
        train(model, optimizer, 1)
        ranks = [layer.r for layer in model]
        assert sum(ranks) == alora.budget == 6 and min(ranks) >= 1
    assert alora.round == 6 and alora.history["steps"][0] == 1
    assert alora.history["values"][-1] == [layer.r for layer in model]


def test_rounds_end():
    model = make()
    optimizer = adamw(model)
    alora = allocator(model, optimizer, every=2, rounds=1)
    train(model, optimizer, 8)
    assert alora.round == 1


def test_the_optimizers_state_follows():
    model = make()
    optimizer = adamw(model)
    alora = allocator(model, optimizer, every=4, moves=2, rounds=1)
    train(model, optimizer, 4)
    grown, cut = [layer for layer in model if layer.r > R], [layer for layer in model if layer.r < R]
    assert alora.round == 1
    assert grown and cut
    assert all(layer.lora_A.weight not in optimizer.state for layer in grown)
    for layer in cut:
        assert optimizer.state[layer.lora_B.weight]["exp_avg"].shape == layer.lora_B.weight.shape
    train(model, optimizer, 3)


def test_a_reallocated_model_is_saved_and_merged(tmp_path):
    model = make()
    optimizer = adamw(model)
    allocator(model, optimizer)
    train(model, optimizer, 6)
    x = torch.randn(4, 16)
    y = model(x)
    lk.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    lk.load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lk.merge_and_unload(model)(x), y, rtol=1e-5, atol=1e-5)


def test_it_goes_on_bit_for_bit():
    def start():
        model = make()
        optimizer = adamw(model)
        return model, optimizer, allocator(model, optimizer, seed=3)

    model, optimizer, alora = start()
    train(model, optimizer, 7)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    train(model, optimizer, 6)
    again, other, resumed = start()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    train(again, other, 6)
    assert resumed.round == alora.round == 2
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    assert resumed.history == alora.history


def test_scoring_leaves_the_mode_and_the_generator_alone():
    model = make().train()
    model[1].eval()
    state = torch.get_rng_state()
    allocator(model, adamw(model)).reallocate()
    assert [layer.training for layer in model] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_refused():
    model = make()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="expected validation batches, got none"):
        ALoRA(model, optimizer, [], mean_square, every=1, moves=1)
    for settings in ({"every": 0}, {"moves": 0}, {"moves": True}, {"rounds": -1}, {"every": 1.5}):
        with pytest.raises(ValueError, match=f"expected {next(iter(settings))} to be an integer"):
            allocator(model, optimizer, **settings)
    with pytest.raises(ValueError, match="moves of at most 9, as each of 3 layers keeps one of 12 ranks, got 10"):
        allocator(model, optimizer, moves=10)
    with pytest.raises(ValueError, match="several layers"):
        allocator(one := make(layers=1), adamw(one))
    ungated = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    lk.adapt(ungated, lk.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="expected layers with a gate, got none in 0"):
        allocator(ungated, adamw(ungated))


def test_a_score_that_is_not_finite_moves_nothing():
    model = make()
    optimizer = adamw(model)
    alora = ALoRA(model, optimizer, batches(), lambda m, b: mean_square(m, b) * math.nan, every=1, moves=1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="finite scores, got nan of the validation loss; nothing has changed"):
        alora.reallocate()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert alora.round == 0


def test_new_ranks_train_where_b_is_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    lk.adapt(model, lk.LoRAConfig(r=R, gate=True, train="a"))
    optimizer = adamw(model)
    alora = allocator(model, optimizer, every=2)
    train(model, optimizer, 1)
    before = alora._ranks.by_layer()
    train(model, optimizer, 1)
    grown = [path for path, r in alora._ranks.by_layer().items() if r > before[path]]
    assert grown
    for path in grown:
        layer = alora.layers[path]
        assert not layer.lora_A.weight[-1].any() and layer.lora_B.weight.any(0).all()
        assert layer.lora_B.weight[:, -1].abs().max() <= layer.r**-0.5
    train(model, optimizer, 1)
    assert all(alora.layers[path].lora_A.weight[-1].any() for path in grown)


@pytest.mark.parametrize("kind", [lk.LoRAConfig, lk.DoRAConfig])
def test_trained_gates_are_put_into_b(kind):
    model = make(kind)
    with torch.no_grad():
        model[0].lora_gate.copy_(torch.tensor([0.5, 0.0, -2.0, 1.0]))
        model[1].lora_gate.zero_()
        x, _ = batches(1)[0]
        y = model(x)
        allocator(model, adamw(model))
        assert all(torch.equal(layer.lora_gate, torch.ones(R)) for layer in model)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
