"""GaLore: Adam in the leading directions of each gradient, its state, its per-layer mode and what it refuses."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.optim import GaLore, galore, galore_groups
from lowrank_kernels.optim.galore import leading_basis

SHAPES = [(24, 40), (40, 24), (16, 16)]


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def by_the_paper(params: list[Tensor], steps: int, *, rank: int, gap: int, scale: float, way: str, lr: float) -> None:
    """Algorithm 2 in float64, with whole singular value decompositions; moments as ``way`` says."""
    states: list[dict[str, Any]] = [{} for _ in params]
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for p, s in zip(params, states, strict=True):
            g = torch.randn(p.shape, generator=generator).double()
            w = p if p.shape[0] <= p.shape[1] else p.T
            g = g if p.shape[0] <= p.shape[1] else g.T
            if step % gap == 0:
                new = torch.linalg.svd(g).U[:, :rank]
                if not s or way == "reset":
                    s |= {"m": torch.zeros(rank, g.shape[1]).double(), "v": torch.zeros(rank, g.shape[1]).double()}
                    s["t"] = 0
                elif way == "rotate":
                    c = new.T @ s["p"]
                    s |= {"m": c @ s["m"], "v": (c * c) @ s["v"]}
                s["p"] = new
            low, s["t"] = s["p"].T @ g, s["t"] + 1
            s["m"] = 0.9 * s["m"] + 0.1 * low
            s["v"] = 0.999 * s["v"] + 0.001 * low * low
            direction = s["m"] / (1 - 0.9 ** s["t"]) / ((s["v"] / (1 - 0.999 ** s["t"])).sqrt() + 1e-8)
            w.copy_((1 - lr * 0.1) * w - lr * scale * s["p"] @ direction)


@pytest.mark.parametrize("way", ["rotate", "reset"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_run_is_that_of_the_paper(way: str, exact: bool) -> None:
    """Whatever signs singular vectors come with: a step does not depend on them where moments follow the basis."""
    params = weights(torch.float64)
    plain = [p.detach().clone() for p in params]
    settings = {"update_proj_gap": 3, "scale": 0.5, "moments": way, "exact_svd": exact}
    # So high a rank that R + 10 columns are all there are: no error of a randomised decomposition.
    optimizer = GaLore([{"params": params, "rank": 14}], lr=0.05, weight_decay=0.1, **settings)
    run(optimizer, params, range(8))
    by_the_paper(plain, 8, rank=14, gap=3, scale=0.5, way=way, lr=0.05)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_rank_is_adamw(dtype: torch.dtype) -> None:
    params, plain = weights(dtype), weights(dtype)
    groups = [{"params": [p], "rank": min(p.shape)} for p in params]
    ours = GaLore(groups, lr=1e-2, weight_decay=0.1, scale=1.0, update_proj_gap=2)
    adamw = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1)
    run(ours, params, range(7))
    run(adamw, plain, range(7))
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_keep_is_what_the_authors_do() -> None:
    """The moments stay numbers when the basis changes, as they are."""
    params = weights()
    optimizer = GaLore([{"params": params, "rank": 4}], moments="keep", update_proj_gap=2)
    run(optimizer, params, range(2))
    before = [optimizer.state[p]["exp_avg"].clone() for p in params]
    bases = [optimizer.state[p]["basis"].clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, m, basis in zip(params, before, bases, strict=True):
        assert not torch.equal(optimizer.state[p]["basis"], basis)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.9 * m)


def test_rotated_moments_are_those_of_the_same_gradients_in_the_new_basis() -> None:
    """Within a span that stays, P m is the same before and after, whatever basis the span has."""
    p = nn.Parameter(torch.zeros(20, 30, dtype=torch.float64))
    left = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    optimizer = GaLore([{"params": [p], "rank": 5}], update_proj_gap=3)
    total = torch.zeros(20, 30, dtype=torch.float64)
    for step in range(9):
        generator = torch.Generator().manual_seed(step)
        p.grad = left @ torch.randn(5, 30, dtype=torch.float64, generator=generator)
        total = 0.9 * total + 0.1 * p.grad
        optimizer.step()
        state = optimizer.state[p]
        torch.testing.assert_close(state["basis"] @ state["exp_avg"], total, rtol=1e-10, atol=1e-10)
        assert (state["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_the_state_is_as_large_as_the_formula_says(rank: int) -> None:
    params = weights()
    optimizer = GaLore([{"params": params, "rank": rank}])
    run(optimizer, params, range(2))
    for p in params:
        short, long = sorted(p.shape)
        sizes = {name: t.numel() for name, t in optimizer.state[p].items()}
        assert sizes == {"step": 1, "basis": rank * short, "exp_avg": rank * long, "exp_avg_sq": rank * long}
        for t in optimizer.state[p].values():
            assert t.dtype == torch.float32 and t.untyped_storage().nbytes() == 4 * t.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4, 5, 6])
def test_a_run_that_was_saved_goes_on_bit_for_bit(dtype: torch.dtype, stop: int) -> None:
    def made(params: list[nn.Parameter]) -> GaLore:
        groups = [{"params": params[:2], "rank": 3}, {"params": params[2:]}]
        return GaLore(groups, lr=1e-2, weight_decay=0.1, update_proj_gap=3)

    whole = weights(dtype)
    run(made(whole), whole, range(9))
    first = weights(dtype)
    optimizer = made(first)
    run(optimizer, first, range(stop))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": [p.detach() for p in first]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [nn.Parameter(t) for t in saved["model"]]
    resumed = made(again)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, again, range(stop, 9))
    for p, q in zip(whole, again, strict=True):
        assert torch.equal(p, q)


def test_a_copy_steps_the_copied_parameters_as_the_original_does() -> None:
    params = weights()
    optimizer = GaLore([{"params": params, "rank": 3}], update_proj_gap=2)
    run(optimizer, params, range(1))
    copied_params, copied = copy.deepcopy((params, optimizer))
    run(optimizer, params, range(1, 4))
    run(copied, copied_params, range(1, 4))
    assert all(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True))
    extra = nn.Parameter(torch.zeros(4, 5))
    copied.add_param_group({"params": [extra], "rank": 2})
    assert extra in copied._places


def test_the_global_generator_is_not_touched_and_the_seed_decides() -> None:
    results = []
    for seed in (0, 0, 1):
        params = [nn.Parameter(torch.zeros(64, 80))]
        before = torch.get_rng_state()
        run(GaLore([{"params": params, "rank": 2}], seed=seed), params, range(2))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(params[0].detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.up, self.down, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(ids), (ids * 3 + 1) % 11)


def train(model: Model, optimizer: GaLore, steps: int, passes: int = 1) -> None:
    for step in range(steps):
        for part in range(passes):
            (loss_of(model, step * passes + part) / passes).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("passes", [1, 3])
def test_per_layer_takes_the_same_steps_to_the_bit_and_frees_each_gradient(passes: int) -> None:
    whole, layers = Model(), Model()
    settings = {"lr": 1e-2, "weight_decay": 0.1, "update_proj_gap": 2}
    train(whole, GaLore(galore_groups(whole, ["up", "down"], 3), **settings), 6, passes)
    optimizer = GaLore(galore_groups(layers, ["up", "down"], 3), per_layer=True, accumulate=passes, **settings)
    for step in range(6):
        for part in range(passes):
            assert step == 0 or part > 0 or all(p.grad is None for p in layers.parameters())
            (loss_of(layers, step * passes + part) / passes).backward()
        assert all(p.grad is None for p in layers.parameters())
        optimizer.step()  # nothing is left for it
    for p, q in zip(whole.parameters(), layers.parameters(), strict=True):
        assert torch.equal(p, q)


def test_per_layer_holds_about_one_gradient_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    alive: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    optimizer = GaLore([{"params": list(model.parameters()), "rank": 4}], per_layer=True)
    model(torch.randn(3, 32)).square().sum().backward()
    assert alive == [1] * 6
    optimizer.detach()
    model(torch.randn(3, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_do_not_keep_the_optimizer() -> None:
    params = weights()
    GaLore([{"params": params, "rank": 2}], per_layer=True)
    (params[0] * params[0]).sum().backward()
    assert params[0].grad is not None


def test_learning_beats_a_random_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs whose variance lies in few directions: the gradient's leading ones, which random ones mostly miss."""
    generator = torch.Generator().manual_seed(0)
    spectrum = 0.7 ** torch.arange(48)
    x = torch.randn(256, 48, generator=generator) * spectrum
    target = torch.randn(48, 64, generator=generator)

    def loss_after(steps: int) -> float:
        w = nn.Parameter(torch.zeros(48, 64))
        optimizer = GaLore([{"params": [w], "rank": 4}], lr=0.05, scale=1.0, update_proj_gap=20)
        for _ in range(steps):
            loss = (x @ (w - target)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float((x @ (w.detach() - target)).square().mean())

    ours = loss_after(100)

    def random_basis(grad: Tensor, rank: int, seed: int, *, exact: bool = False) -> Tensor:
        return torch.linalg.qr(torch.randn(grad.shape[0], rank, generator=torch.Generator().manual_seed(seed))).Q

    monkeypatch.setattr(galore, "leading_basis", random_basis)
    assert ours < 0.5 * loss_after(100)


@pytest.mark.parametrize("shape", [(60, 90), (90, 90), (40, 300)])
def test_the_randomised_basis_holds_what_the_exact_one_does(shape: tuple[int, int]) -> None:
    """Of a flat spectrum, the hardest: at least 0.95 of the energy that the exact one holds."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    found, exact = leading_basis(g, 8, 1), leading_basis(g, 8, 1, exact=True)
    torch.testing.assert_close(found.T @ found, torch.eye(8), rtol=0, atol=1e-5)
    assert (found.T @ g).norm() >= 0.95**0.5 * (exact.T @ g).norm()
    assert found.is_contiguous()


def test_a_gradient_of_zeros_moves_nothing_but_by_decay() -> None:
    p = nn.Parameter(torch.ones(20, 30))
    optimizer = GaLore([{"params": [p], "rank": 4}], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(20, 30)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((20, 30), 0.95))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves(bad: float, place: int) -> None:
    params = weights()
    optimizer = GaLore([{"params": params[:2], "rank": 3}, {"params": params[2:]}])
    run(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    kept = [{name: t.clone() for name, t in optimizer.state[p].items()} for p in params]
    give_gradients(params, 2)
    params[place].grad[3, 4] = bad  # type: ignore[index]
    with pytest.raises(ValueError, match=rf"^GaLore: expected finite gradients, and that of parameter {place}, of sh"):
        optimizer.step()
    for p, q, state in zip(params, before, kept, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, optimizer.state[p][name]) for name, t in state.items())


def test_per_layer_refuses_a_gradient_that_is_not_finite() -> None:
    p = nn.Parameter(torch.ones(8, 8))
    optimizer = GaLore([{"params": [p], "rank": 3}], per_layer=True)
    with pytest.raises(ValueError, match="expected finite gradients"):
        (p * float("nan")).sum().backward()
    assert torch.equal(p.detach(), torch.ones(8, 8)) and not optimizer.state[p]


FROZEN = nn.Parameter(torch.zeros(4, 6), requires_grad=False)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: GaLore([{"params": weights()}]), ValueError, "expected a group with a rank"),
    (lambda: GaLore([{"params": weights(), "rank": 17}]), ValueError, r"at most min\(N, K\) = 16, and parameter 2 "),
    (lambda: GaLore([{"params": weights(), "rank": 0}]), ValueError, "rank of at least 1, got 0"),
    (lambda: GaLore([{"params": weights(), "rank": 2.0}]), TypeError, "rank to be an integer"),
    (lambda: GaLore([{"params": [FROZEN], "rank": 2}]), ValueError, r"of shape \(4, 6\), is frozen"),
    (lambda: GaLore([{"params": [nn.Parameter(torch.zeros(4))], "rank": 2}]), ValueError, "expected matrices"),
    (lambda: GaLore([{"params": weights(), "rank": 2, "moments": "turn"}]), ValueError, "moments to be one of rotate"),
    (lambda: GaLore([{"params": weights(), "rank": 2, "proj_type": "full"}]), ValueError, "proj_type 'std'"),
    (lambda: GaLore([{"params": weights(), "rank": 2, "update_proj_gap": 0}]), ValueError, "update_proj_gap of at "),
    (lambda: GaLore([{"params": weights(), "rank": 2, "scale": -1.0}]), ValueError, "scale of at least 0"),
    (lambda: GaLore([{"params": weights(), "rank": 2}], lr=float("nan")), ValueError, "lr to be finite"),
    (lambda: GaLore([{"params": weights(), "rank": 2}], betas=(0.9, 1.0)), ValueError, "betas of at least 0 and be"),
    (lambda: GaLore([{"params": weights(), "rank": 2}], seed="0"), TypeError, "seed to be an integer"),
    (lambda: GaLore([{"params": weights(), "rank": 2}], per_layer=1), TypeError, "per_layer to be True or False"),
    (lambda: GaLore([{"params": weights(), "rank": 2}], accumulate=2), ValueError, "accumulate=1 without per_layer"),
    (lambda: GaLore([{"params": weights(), "rank": 2}], per_layer=True, accumulate=0), ValueError, "accumulate of at"),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED)
def test_settings_that_do_not_fit_are_refused(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^GaLore: expected .*{words}|^GaLore: {words}"):
        make()


def test_groups_of_a_model() -> None:
    model = Model()
    first, others = galore_groups(model, ["up", "down"], 4, scale=0.5, weight_decay=0.1)
    assert [id(p) for p in first["params"]] == [id(model.up.weight), id(model.down.weight)]
    assert {k: v for k, v in first.items() if k != "params"} == {
        "rank": 4,
        "update_proj_gap": 200,
        "scale": 0.5,
        "weight_decay": 0.1,
    }
    rest = {id(model.embed.weight), id(model.up.bias), id(model.down.bias), id(model.head.weight)}
    assert {id(p) for p in others["params"]} == rest
    assert len(galore_groups(model, "all-linear", 4)[0]["params"]) == 3
    model.head.weight = model.embed.weight  # tied: an embedding's
    assert len(galore_groups(model, "all-linear", 4)[0]["params"]) == 2
    assert len(galore_groups(nn.Sequential(nn.Linear(4, 4, bias=False)), "0", 4)) == 1


@pytest.mark.parametrize(
    ("change", "arguments", "error", "words"),
    [
        (lambda m: m.up.weight.requires_grad_(False), (["up"], 4), ValueError, "up.weight is frozen"),
        (lambda m: None, (["up"], 17), ValueError, r"= 16 for up.weight of shape \(40, 16\), got 17; lower it"),
        (lambda m: None, (["up", "left"], 4), ValueError, "found none for left"),
        (lambda m: None, ([], 4), ValueError, "found none for"),
        (lambda m: None, ([3], 4), TypeError, "target_modules to be names"),
        (lambda m: None, (["up"], "4"), TypeError, "rank to be an integer"),
        (lambda m: m.requires_grad_(False), ("all-linear", 4), ValueError, "found none for all-linear"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    change: Callable[[Model], Any], arguments: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    model = Model()
    change(model)
    with pytest.raises(error, match=rf"^galore_groups: .*{words}"):
        galore_groups(model, *arguments)


def test_the_op_and_the_reference_are_public() -> None:
    assert lk.galore_adam_ is lk.functional.galore_adam_  # type: ignore[attr-defined]
