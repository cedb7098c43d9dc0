"""LaMDA: where it starts, what it saves for backward, which columns are frozen when, LaMDA++'s ranks, and files."""

import copy
import io

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.allocate import LaMDA, SoRA, spectral_ranks
from lowrank_kernels.chain import cola
from lowrank_kernels.nn.lamda import leading_svd
from lowrank_kernels.optim import factor_groups

R = 4


def make(r=R, seed=0, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(13, 10), nn.Tanh(), nn.Linear(10, 7))
    lk.adapt(model, lk.LaMDAConfig(r=r, alpha=3.0, **settings))
    return model


def moved(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def step(model, optimizer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(9, 13, generator=generator), torch.randn(9, 7, generator=generator)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_starts_as_the_base_whose_weight_stays(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(13, 10, dtype=dtype)
    before, x = linear.weight.detach().clone(), torch.randn(3, 2, 13, dtype=dtype)
    expected = linear(x)
    layer = lk.nn.LaMDALinear.from_linear(linear, R)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        assert torch.equal(linear.weight, before)
        assert not layer.factors()[1].any()


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_the_start_at_the_base_and_the_correction_as_it_was(before, after):
    torch.manual_seed(0)
    layer = lk.nn.LaMDALinear.from_linear(nn.Linear(64, 64).to(before), 16, dtype=before)
    twin = copy.deepcopy(layer)
    layer.to(after)
    assert not layer.factors()[1].any() and layer.lamda_start.dtype == after
    moved(twin)
    correction = twin.factors()[1].double()
    twin.to(after)
    loosest = max(torch.finfo(before).eps, torch.finfo(after).eps)
    torch.testing.assert_close(twin.factors()[1].double(), correction, rtol=0, atol=4 * loosest)


def test_is_the_papers_form_over_a_residual_weight():
    """y = x (W - s B₀ S₀ A)ᵀ + s B S A x, in float64, and the gradients of B and S; A gets none."""
    torch.manual_seed(0)
    linear = nn.Linear(13, 10, dtype=torch.float64)
    layer = lk.nn.LaMDALinear.from_linear(linear, R, alpha=3.0)
    a, start = layer.lamda_A.detach(), (layer.lamda_B @ layer.lamda_S).detach()
    u, sigma, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    torch.testing.assert_close(start @ a, u[:, :R] @ sigma[:R].diag() @ vh[:R], rtol=1e-10, atol=1e-10)
    moved(layer)
    b, s = (p.detach().clone().requires_grad_() for p in (layer.lamda_B, layer.lamda_S))
    x = torch.randn(5, 13, dtype=torch.float64)
    residual = linear.weight.detach() - 0.75 * start @ a
    expected = x @ residual.T + linear.bias.detach() + 0.75 * x @ a.T @ s.T @ b.T
    weights = torch.randn_like(expected)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    (layer(x) * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(layer.lamda_B.grad, b.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.lamda_S.grad, s.grad, rtol=1e-10, atol=1e-10)
    assert layer.lamda_A.grad is None


def test_saves_p_and_no_x():
    layer = lk.nn.LaMDALinear.from_linear(nn.Linear(128, 96), R)
    x, saved = torch.randn(50, 128), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(x)
    assert (50, R) in saved
    assert not any(50 in shape and 128 in shape for shape in saved)


def test_autocast_does_not_round_the_two_products_that_cancel():
    layer = lk.nn.LaMDALinear.from_linear(nn.Linear(64, 64), 8)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_columns_are_frozen_on_schedule_and_keep_their_bits(optimizer):
    model = make()
    settings = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    stepped = optimizer([p for p in model.parameters() if p.requires_grad], **settings)
    LaMDA(model, stepped, 20, share=0.4)  # R = 4 over 8 steps: a column in two
    layer = model[0]
    for t in range(12):
        b, s = layer.lamda_B.detach().clone(), layer.lamda_S.detach().clone()
        frozen = min(R, t // 2)
        step(model, stepped)
        if t < 7:  # the last column's gradient is dropped after step 7
            assert layer.lamda_B.grad.any(dim=0).tolist() == [i >= frozen for i in range(R)]
        assert torch.equal(layer.lamda_B[:, :frozen], b[:, :frozen])
        assert (layer.lamda_B[:, frozen:] != b[:, frozen:]).all()
        assert not torch.equal(layer.lamda_S, s)
    assert not layer.lamda_B.requires_grad
    assert layer.lamda_B not in stepped.state


@pytest.mark.parametrize(("share", "steps"), [(0.55, 100), (0.07, 100), (0.1, 30), (0.29, 100), (0.3, 1000)])
def test_the_schedule_is_exact_where_floats_are_not(share, steps):
    model = make()
    rider = LaMDA(model, _adamw(model), steps, share=share)
    over = round(share * steps)
    for t in range(over + 2):
        rider.steps_taken = t
        assert rider.columns(model[0]) == min(R, R * t // over), t


def test_what_the_optimizer_does_not_step_stays_frozen():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    lk.adapt(model, lk.LaMDAConfig(r=R))
    model[0].requires_grad_(False)
    model[1].lamda_B.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    LaMDA(model, optimizer, 20)
    for _ in range(2):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {"1.lamda_S", "2.lamda_B", "2.lamda_S"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == moved
    optimizer.zero_grad()


@pytest.mark.parametrize("at", [3, 9])
def test_resumes_bit_for_bit(at):
    def run(model, optimizer, steps):
        for i in steps:
            step(model, optimizer, seed=i)

    def start():
        model = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        return model, optimizer, LaMDA(model, optimizer, 20, share=0.4)

    model, optimizer, _ = start()
    run(model, optimizer, range(at))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, range(at, 12))
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, optimizer, rider = start()
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert rider.steps_taken == at
    run(again, optimizer, range(at, 12))
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name


def test_a_step_that_raises_leaves_frozen_columns_as_they_were():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("broken")

    model = make()
    optimizer = Broken([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    rider = LaMDA(model, optimizer, 8, share=1.0)
    rider.steps_taken = 4
    rider._freeze()
    before = model[0].lamda_B.detach().clone()
    with pytest.raises(RuntimeError, match="broken"):
        step(model, optimizer)
    assert torch.equal(model[0].lamda_B[:, :2], before[:, :2])


def test_spectral_ranks_take_the_largest_normalised_energies_and_the_whole_budget():
    torch.manual_seed(0)
    flat, steep = (nn.Linear(16, 16, bias=False) for _ in range(2))
    with torch.no_grad():
        u, v = (torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2))
        flat.weight.copy_(u @ v)
        steep.weight.copy_(u @ torch.diag(2.0 ** -torch.arange(16.0)) @ v)
    config = lk.LaMDAConfig(r=5, alpha=10.0)
    found = spectral_ranks(nn.Sequential(flat, steep), config)
    ranks = found.rank_of("0"), found.rank_of("1")
    # Flat: 1/16 each. Steep: 0.75 of what is left each time, so that 0.75, 0.19 are above 1/16, and 0.047 is not.
    assert ranks == (8, 2)
    assert found.scaling_of("0") == pytest.approx(2.0)
    assert found.scaling_of("1") == pytest.approx(2.0)
    for budget in (2, 7, 32):
        given = spectral_ranks(nn.Sequential(flat, steep), config, budget)
        assert given.rank_of("0") + given.rank_of("1") == budget
    model = nn.Sequential(flat, steep)
    lk.adapt(model, found)
    assert [layer.r for layer in model] == [8, 2]


def test_merges_and_unmerges():
    model, x = moved(make()), torch.randn(6, 13)
    expected, weight = model(x).detach(), model[0].base_layer.weight.detach().clone()
    model[0].merge_()
    torch.testing.assert_close(model(x), expected)
    model[0].unmerge_()
    torch.testing.assert_close(model[0].base_layer.weight, weight)
    lk.merge_and_unload(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_its_file_is_a_lora_of_pefts_over_the_same_base(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = moved(make(rslora=True)), torch.randn(6, 13)
    lk.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(13, 10), nn.Tanh(), nn.Linear(10, 7))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    lk.load_adapter(base, tmp_path)
    assert type(base[0]) is lk.nn.LoRALinear
    torch.testing.assert_close(base(x), model(x))


def test_over_few_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    lk.quantize_(model, "nf4")
    x = torch.randn(3, 64)
    expected = model(x)
    lk.adapt(model, lk.LaMDAConfig(r=R))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert model[0].lamda_S.grad.isfinite().all()


def test_hooks_of_the_base_run():
    model, x, seen = moved(make()), torch.randn(6, 13), []
    expected = model(x)
    model[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    assert seen


def test_a_wide_weight_is_decomposed_at_random_and_starts_as_the_base():
    torch.manual_seed(0)
    weight = torch.randn(40, 8) @ torch.randn(8, 2100)
    state = torch.get_rng_state()
    u, sigma, vh = leading_svd(weight, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(u @ sigma.diag() @ vh, weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(u.T @ u, torch.eye(8), rtol=1e-4, atol=1e-4)


def test_ugly_inputs():
    layer = moved(lk.nn.LaMDALinear.from_linear(nn.Linear(13, 7), 7))
    assert layer(torch.randn(0, 13)).shape == (0, 7)
    torch.testing.assert_close(layer(torch.randn(13, 4).T).shape, torch.Size([4, 7]))
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 13)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize(
    ("make_it_wrong", "message"),
    [
        (lambda: lk.nn.LaMDALinear.from_linear(nn.Linear(4, 4), 5), "at most min"),
        (lambda: lk.LaMDAConfig(gate=True), "expected gate to be left out"),
        (lambda: lk.LaMDAConfig(lora_bias=True), "expected lora_bias to be left out"),
        (lambda: lk.LaMDAConfig(velora=4), "expected velora to be left out"),
        (lambda: LaMDA(nn.Linear(2, 2), _adamw(nn.Linear(2, 2)), 5), "LaMDALinear layers, got none"),
        (lambda: LaMDA(make(), _adamw(make()), 5), "expected an optimizer of this model's B and S"),
        (lambda: LaMDA(make(), _adamw(make()), 0), "steps to be an integer of at least 1"),
        (lambda: LaMDA(make(), _adamw(make()), 5, share=1.5), "share to be a number from 0 to 1"),
        (lambda: spectral_ranks(nn.Linear(4, 4), lk.LaMDAConfig(r=2)), "replaces nothing"),
        (lambda: spectral_ranks(nn.Sequential(nn.Linear(4, 4)), lk.LaMDAConfig(r=2), 0), "at least 1"),
        (lambda: spectral_ranks(nn.Sequential(nn.Linear(4, 4)), lk.LaMDAConfig(r=2), 5), "budget of at most 4"),
        (lambda: spectral_ranks(_of(torch.nan), lk.LaMDAConfig(r=2)), "finite weights, got NaN or Inf in 0"),
        (lambda: spectral_ranks(_of(1.0).to("meta"), lk.LaMDAConfig(r=2)), "weights at hand, got 0 on the meta device"),
        (lambda: lk.adapt(_of(torch.nan), lk.LaMDAConfig(r=2)), "adapt: 0: leading_svd: expected a finite weight"),
        (lambda: lk.adapt(_of(torch.inf), lk.SVFTConfig()), "adapt: 0: SVFTLinear: expected a finite weight"),
        (lambda: leading_svd(torch.full((3, 3), torch.nan), 1), "finite weight"),
        (lambda: make()[0].change_ranks_([0]), "A and B alone"),
        (lambda: SoRA(make(), _adamw(make()), 0.1), "expected layers with a gate"),
        (lambda: cola(make(), _adamw(make()), 5), "LoRALinear"),
        (lambda: factor_groups(make()), "factor"),
    ],
)
def test_what_is_refused(make_it_wrong, message):
    with pytest.raises(ValueError, match=message):
        make_it_wrong()


def _adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _of(value):
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, value)
    return model
