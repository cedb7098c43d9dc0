"""GMT: exact counts, deterministic ties, what keeps its bits, windows, and the optimizer alone at a share of 1."""

import io

import pytest
import torch
from torch import nn

from lowrank_kernels.optim import GMT
from lowrank_kernels.optim.gmt import chosen, largest


def make(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(11, 17), nn.Tanh(), nn.Linear(17, 5)).to(dtype)


def backward(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    dtype = model[0].weight.dtype
    x, y = (torch.randn(9, n, generator=generator).to(dtype) for n in (11, 5))
    (scale * (model(x) - y).square().mean()).backward()


def step(model, optimizer, seed):
    optimizer.zero_grad()
    backward(model, seed)
    optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name: p.detach() != before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 37, 500, 999, 1000])
def test_as_many_as_asked_and_the_largest(dtype, count):
    generator = torch.Generator().manual_seed(count)
    t = torch.randn(1000, generator=generator).to(dtype)  # half precision has ties
    (mask,) = chosen([t], largest([t], count))
    assert int(mask.sum()) == count
    if count < 1000:
        assert t[mask].abs().min() >= t[~mask].abs().max()
    expected = t.float().abs().sort(descending=True, stable=True).indices[:count]  # of equal ones the first
    assert mask.nonzero().flatten().tolist() == sorted(expected.tolist())


def test_ties_over_several_tensors_go_to_the_first():
    a, b = torch.tensor([[1.0, -2.0], [2.0, 0.5]]).T, torch.tensor([-2.0, 2.0, 3.0])
    masks = chosen([a, b], largest([a, b], 4))
    assert masks[0].tolist() == [[False, True], [True, False]]
    assert masks[1].tolist() == [True, False, True]


def test_zeros_and_numbers_that_are_not_finite():
    t = torch.tensor([0.0, -0.0, torch.nan, 1.0, torch.inf, 0.0])
    assert chosen([t], largest([t], 1))[0].tolist() == [False, False, True, False, False, False]
    assert chosen([t], largest([t], 2))[0].tolist() == [False, False, True, False, True, False]
    assert chosen([t], largest([t], 4))[0].tolist() == [True, False, True, True, True, False]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_one_histogram_meets_the_share_nearly(share):
    t = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    count = round(share * t.numel())
    (mask,) = chosen([t], largest([t], count, exact=False))
    threshold = t[mask].abs().min()
    kth = t.abs().sort(descending=True).values[count - 1]
    assert 2**-0.0625 <= threshold / kth <= 2**0.0626
    assert 0 < int(mask.sum()) < t.numel()


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("over", ["tensor", "all"])
def test_what_is_not_chosen_keeps_its_bits(make_optimizer, over):
    model = make()
    settings = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if make_optimizer is torch.optim.SGD else {})
    optimizer = make_optimizer(model.parameters(), **settings)
    GMT(model, optimizer, 0.3, over=over)
    for i in range(4):
        before = values(model)
        optimizer.zero_grad()
        backward(model, i)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        changed = moved(model, before)
        if over == "tensor":
            for name, g in grads.items():
                count = max(1, round(0.3 * g.numel()))
                assert torch.equal(changed[name], g.abs() >= g.abs().flatten().sort(descending=True).values[count - 1])
        else:
            every = torch.cat([g.abs().flatten() for g in grads.values()])
            flat = torch.cat([c.flatten() for c in changed.values()])
            kth = every.sort(descending=True).values[round(0.3 * every.numel()) - 1]
            assert torch.equal(flat, every >= kth)


@pytest.mark.parametrize("over", ["tensor", "all"])
def test_a_share_of_1_is_the_optimizer_alone(over):
    alone, model = make(), make()
    plain, masked = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (alone, model))
    GMT(model, masked, 1.0, over=over)
    for i in range(3):
        step(alone, plain, i)
        step(model, masked, i)
    assert not any(changed.any() for changed in moved(model, values(alone)).values())


def test_a_step_is_the_optimizers_on_masked_gradients():
    model, other = make(), make()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    GMT(model, optimizer, 0.25)
    for i in range(2):
        before = values(other)
        step(model, optimizer, i)
        plain.zero_grad()
        backward(other, i)
        masks = {}
        for name, p in other.named_parameters():
            kth = p.grad.abs().flatten().sort(descending=True).values[max(1, round(0.25 * p.numel())) - 1]
            masks[name] = p.grad.abs() >= kth
            p.grad *= masks[name]
        plain.step()
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.copy_(torch.where(masks[name], p, before[name]))
        for name, p in model.named_parameters():
            assert torch.equal(p, dict(other.named_parameters())[name])


def test_gradients_accumulate_in_the_loop():
    model, whole = make(), make()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    for m, optimizer in zip((model, whole), optimizers, strict=True):
        GMT(m, optimizer, 0.3)
    for part in range(2):
        backward(model, part, 0.5)
    x, y = [], []
    for part in range(2):
        generator = torch.Generator().manual_seed(part)
        x.append(torch.randn(9, 11, generator=generator))
        y.append(torch.randn(9, 5, generator=generator))
    (whole(torch.cat(x)) - torch.cat(y)).square().mean().backward()
    before = values(model)
    for optimizer in optimizers:
        optimizer.step()
    for name, changed in moved(model, before).items():
        assert torch.equal(changed, dict(whole.named_parameters())[name] != before[name])


def test_a_choice_holds_for_a_window_and_is_made_anew():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GMT(model, optimizer, 0.2, window=3)
    seen = []
    for i in range(6):
        before = values(model)
        step(model, optimizer, i)
        seen.append(moved(model, before)["0.weight"])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert torch.equal(seen[3], seen[4])
    assert not torch.equal(seen[2], seen[3])


@pytest.mark.parametrize("at", [3, 4, 5])
def test_resumes_bit_for_bit_in_a_window_too(at):
    def start():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, optimizer, GMT(model, optimizer, 0.2, window=3, note_every=1)

    model, optimizer, rider = start()
    for i in range(at):
        step(model, optimizer, i)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for i in range(at, 8):
        step(model, optimizer, i)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, resumed, other = start()
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for i in range(at, 8):
        step(again, resumed, i)
    assert not any(changed.any() for changed in moved(again, values(model)).values())
    assert other.history == rider.history
    assert len(rider.history["values"]) == 1  # a share of each tensor stays what it is


def test_a_step_that_raises_moves_only_what_is_chosen():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("broken")

    model = make()
    optimizer = Broken(model.parameters(), lr=0.1, weight_decay=0.5)
    GMT(model, optimizer, 0.2)
    before = values(model)
    with pytest.raises(RuntimeError, match="broken"):
        step(model, optimizer, 0)
    assert int(moved(model, before)["0.weight"].sum()) == round(0.2 * 11 * 17)


def test_tied_frozen_and_unused_parameters_and_bfloat16():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "unused": nn.Linear(6, 6)}).to(torch.bfloat16)
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    GMT(model, optimizer, 0.25)
    before = values(model)
    x = torch.randn(4, 6).to(torch.bfloat16)
    model["b"](model["a"](x)).square().sum().backward()
    optimizer.step()
    changed = moved(model, before)
    assert int(changed["a.weight"].sum()) == 9
    assert not changed["a.bias"].any() and not changed["unused.weight"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, "share to be above 0 and at most 1"),
        ({"share": 1.5}, "share to be above 0 and at most 1"),
        ({"share": float("nan")}, "share to be finite"),
        ({"window": 0}, "window to be an integer of at least 1"),
        ({"over": "rows"}, "over to be one of tensor, all"),
    ],
)
def test_what_is_refused(arguments, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        GMT(model, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


def test_optimizers_of_other_parameters_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="the model's own parameters"):
        GMT(make(), torch.optim.SGD(make().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="model to be a torch"):
        GMT(None, torch.optim.SGD(make().parameters(), lr=0.1))
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GMT(model, optimizer)
    model(torch.tensor([1])).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="expected dense gradients"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_parameters_that_the_optimizer_got_later_are_told():
    model = make()
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([first], lr=0.1)
    rider = GMT(model, optimizer)
    optimizer.add_param_group({"params": others})
    backward(model, 0)
    before = values(model)
    with pytest.raises(ValueError, match="expected the optimizer's parameters to be those that it had"):
        optimizer.step()
    assert not any(m.any() for m in moved(model, before).values())
    rider.detach()
    GMT(model, optimizer)
    optimizer.step()
