"""Chains: what a link does, resuming in its middle, and the paper's claims in float64."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.chain import Chain, cola, rac_lora
from lowrank_kernels.federated import fed_rac_lora_
from lowrank_kernels.optim import LoRARITE, factor_groups

F64, BF16 = torch.float64, torch.bfloat16


def matrix_model(weight: Tensor, train: str, r: int, init: str = "orthonormal") -> nn.Sequential:
    """W alone, as a model; alpha = R, so s = 1."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    model[0].weight.data.copy_(weight)
    torch.manual_seed(0)
    lk.adapt(model, lk.LoRAConfig(r=r, alpha=r, train=train, init=init))
    return model


def effective(layer: lk.nn.LoRALinear) -> Tensor:
    return layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("train", ["a", "b"])
def test_a_link_of_one_sgd_step_is_a_projected_step(train: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, gradient = (torch.randn(7, 9, generator=generator, dtype=F64) for _ in range(2))
    model = matrix_model(w, train, r=3)
    rate = 0.3
    chain = rac_lora(model, torch.optim.SGD(factors(model), lr=rate), 1)
    layer = model[0]
    a, b = layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()
    (effective(layer) * gradient).sum().backward()
    chain.optimizer.step()
    expected = w - rate * (gradient @ a.T @ a if train == "b" else b @ b.T @ gradient)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-12)
    assert chain.link == 1 and not torch.equal(
        layer.lora_A.weight if train == "b" else layer.lora_B.weight, a if train == "b" else b
    )


def test_isotropic_rate() -> None:
    """f = ‖W - W*‖² / 2: the expected error after T links at rate 1 is (1 - R/n)ᵀ of the first, within 5%."""
    n, r, links, rows = 12, 3, 20, 4000
    target = torch.randn(rows, n, dtype=F64, generator=torch.Generator().manual_seed(0))
    errors = []
    for seed in range(40):
        model = matrix_model(torch.zeros(rows, n, dtype=F64), "b", r)
        chain = rac_lora(model, torch.optim.SGD(factors(model), lr=1.0), 1, seed=seed)
        for _ in range(links):
            chain.optimizer.zero_grad()
            (0.5 * (effective(model[0]) - target).square().sum()).backward()
            chain.optimizer.step()
        errors.append(((model[0].weight - target).square().sum() / target.square().sum()).item())
    expected = (1 - r / n) ** links
    assert abs(sum(errors) / len(errors) - expected) < 0.05 * expected


def quadratic(weight: Tensor) -> Tensor:
    """f(W) = w' diag(10, 1, …, 1) w / 2 over the nine elements of a 3×3 W, around a target: L = 10."""
    target = torch.arange(1.0, 10.0, dtype=F64).reshape(3, 3) / 5
    target[0, 0] += 1
    scale = torch.ones(9, dtype=F64)
    scale[0] = 10
    return 0.5 * (scale * (weight - target).flatten().square()).sum()


def test_the_quadratic_that_rac_solves_and_one_sided_lora_does_not() -> None:
    finals = {}
    for method in ("rac", "lora", "asymmetric"):
        model = matrix_model(torch.zeros(3, 3, dtype=F64), "both" if method == "lora" else "b", r=1)
        optimizer = torch.optim.SGD(factors(model), lr=0.1)
        chain = rac_lora(model, optimizer, 1) if method == "rac" else None
        for _ in range(3000):
            optimizer.zero_grad()
            quadratic(effective(model[0])).backward()
            optimizer.step()
        finals[method] = quadratic(effective(model[0]).detach()).item()
        assert chain is None or chain.link == 3000
    assert finals["rac"] < 1e-14
    assert not finals["lora"] < 1e-3 and not finals["asymmetric"] < 1e-3  # stalled, or not a number


def small_model(train: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype)
    lk.adapt(model, lk.LoRAConfig(r=3, alpha=6, train=train))
    return model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: object, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 10, generator=generator), torch.randn(8, 4, generator=generator)
    optimizer.zero_grad()
    loss = (model(x.to(model[0].weight.dtype)).float() - y).square().mean()
    loss.backward()
    optimizer.step()
    schedule.step()  # type: ignore[attr-defined]
    return loss.item()


SETTINGS = [
    ("b", torch.float32, {}, "adam"),
    ("a", BF16, {"rounding": "stochastic"}, "adam"),
    ("b", BF16, {"master": True}, "adam"),
    ("both", torch.float32, {}, "adam"),
    ("both", torch.float32, {"init": "kaiming"}, "rite"),
    ("both", torch.float32, {"ranks": (3, 2, 1)}, "adam"),
    ("b", torch.float32, {"ranks": (3, 1, 2)}, "adam"),
]


@pytest.mark.parametrize(("train", "dtype", "settings", "kind"), SETTINGS)
def test_resumed_in_the_middle_of_a_link_bit_for_bit(train: str, dtype: torch.dtype, settings: dict, kind: str) -> None:  # type: ignore[type-arg]
    def make() -> tuple[nn.Module, torch.optim.Optimizer, object, Chain]:
        model = small_model(train, dtype)
        optimizer = (
            LoRARITE(factor_groups(model), lr=1e-2) if kind == "rite" else torch.optim.AdamW(factors(model), lr=1e-2)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
        start = cola if train == "both" else rac_lora
        return model, optimizer, schedule, start(model, optimizer, 4, warmup=2, seed=3, **settings)

    model, optimizer, schedule, chain = make()
    for step in range(10):
        train_step(model, optimizer, schedule, step)
    assert (chain.link, chain.link_step) == (2, 2)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], file)  # type: ignore[attr-defined]
    again = make()
    for part, state in zip(again[:3], torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    torch.manual_seed(99)  # nothing of what follows may depend on torch's generator
    for step in range(10, 19):
        assert train_step(model, optimizer, schedule, step) == train_step(*again[:3], step)
    assert again[3].link == chain.link == 4
    for (name, p), q in zip(model.state_dict().items(), again[0].state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("train", ["a", "b", "both"])
def test_a_link_changes_no_output_and_drops_the_state(train: str) -> None:
    model = small_model(train)
    optimizer = torch.optim.AdamW(factors(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    chain = Chain(model, optimizer, 100, init="kaiming")
    for step in range(5):
        train_step(model, optimizer, schedule, step)
    x = torch.randn(20, 10)
    y, rate = model(x), schedule.get_last_lr()
    drawn = torch.get_rng_state()
    chain.merge()  # by itself, as at the end of training
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    chain.next_link()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    assert not optimizer.state and schedule.get_last_lr() == rate
    assert torch.equal(torch.get_rng_state(), drawn)
    for layer in chain.layers.values():
        assert not effective(layer).sub(layer.weight).any()


def test_the_rank_of_colas_update_grows_by_r_a_link() -> None:
    model = small_model("both")
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(factors(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    cola(model, optimizer, 5)
    for step in range(10):
        train_step(model, optimizer, schedule, step)
    values = torch.linalg.svdvals((model[0].weight - before).double().detach())
    assert values[5] > 1e-4 and values[6] < 1e-5 * values[0]  # two links of rank 3


def test_links_of_their_own_ranks() -> None:
    """The update of links of ranks 3, 2, 1 has rank 6; the parameters are the optimizer's all along, s = alpha / R."""
    model = small_model("both")
    first, second = model[0], model[2]
    before, parameters = first.weight.detach().clone(), factors(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    chain = cola(model, optimizer, 5, ranks=(3, 2, 1))
    for step in range(15):
        rank = 3 - chain.link
        assert first.r == second.r == rank and first.scaling == 6 / rank
        assert first.lora_A.weight.shape == (rank, 10) and first.lora_B.weight.shape == (16, rank)
        train_step(model, optimizer, schedule, step)
    assert chain.link == 3 and first.r == 1 and all(p is q for p, q in zip(factors(model), parameters, strict=True))
    values = torch.linalg.svdvals((first.weight - before).double().detach())
    assert values[5] > 1e-4 and values[6] < 1e-5 * values[0]


def test_the_last_steps_graph_may_be_alive_at_a_link_of_another_rank() -> None:
    model = small_model("both")
    optimizer = torch.optim.SGD(factors(model), lr=0.01)
    cola(model, optimizer, 1, ranks=(3, 2, 1))
    for _ in range(3):
        loss = model(torch.randn(4, 10)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_layer_of_a_lower_rank_keeps_its_own() -> None:
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 4))
    lk.adapt(model, lk.LoRAConfig(r=4, rank_pattern={"1": 2}))
    chain = cola(model, torch.optim.SGD(factors(model), lr=1.0), 5, ranks=(3, 1))
    assert (model[0].r, model[1].r) == (3, 2)
    chain.next_link()
    assert (model[0].r, model[1].r) == (1, 1)


def test_warmup_bends_the_rate_of_later_links_alone() -> None:
    model = small_model("b")
    optimizer = torch.optim.SGD(factors(model), lr=0.5)
    chain = rac_lora(model, optimizer, 4, warmup=2)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)  # goes on from the rate that it finds
    for step in range(9):
        train_step(model, optimizer, schedule, step)
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == [0.5] * 4 + [0.25, 0.5, 0.5, 0.5] + [0.25]
    assert chain.link == 2


def test_a_master_keeps_what_rounding_would_lose() -> None:
    weights = {}
    for master in (False, True):
        model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(BF16)
        model[0].weight.data.fill_(1.0)
        lk.adapt(model, lk.LoRAConfig(r=1, alpha=1, train="b"))
        chain = rac_lora(model, torch.optim.SGD(factors(model), lr=1.0), 1, init="kaiming", master=master)
        for _ in range(64):
            model[0].lora_A.weight.data.fill_(1.0)
            model[0].lora_B.weight.data.fill_(2.0**-12)
            chain.next_link()
        weights[master] = model[0].weight.detach().float()
    assert torch.equal(weights[False], torch.ones(8, 8))
    assert torch.equal(weights[True], torch.full((8, 8), 1.0 + 2.0**-6))


def test_one_sided_training_keeps_no_input() -> None:
    """Backward holds P (M, R) beside the parameters, and not x (M, K)."""
    M, K, N, R = 512, 256, 128, 4
    saved = {}
    for train in ("both", "b"):
        layer = lk.nn.LoRALinear.from_linear(nn.Linear(K, N), R, train=train)
        x = torch.randn(M, K, requires_grad=True) * 1.0  # not a leaf, so that nobody else keeps it
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept: dict[int, int] = {}

        def keep(t: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x)
        saved[train] = sum(kept.values())
    assert saved == {"b": 4 * M * R, "both": 4 * (M * R + M * K)}


def test_broken_factors_stop_a_link_before_it_changes_anything() -> None:
    model = small_model("b")
    chain = rac_lora(model, torch.optim.SGD(factors(model), lr=1.0), 5)
    model[0].lora_B.weight.data.normal_()
    model[2].lora_B.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"rac_lora: expected finite factors at the end of link 0, .* in 2; no weight"):
        chain.next_link()
    assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in model.state_dict().items())


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(1, 3)


def start(model: nn.Module, method: Callable[..., Chain] = rac_lora, steps: int = 5, **settings: object) -> Chain:
    return method(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), steps, **settings)


def dora_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    lk.adapt(model, lk.DoRAConfig(r=1))
    return model


def quantised_model() -> nn.Module:
    model = small_model("b")
    model[2].base_layer.weight.data = model[2].base_layer.weight.data.to(torch.int8)
    return model


def wide_by_hand() -> nn.Module:
    return nn.Sequential(lk.nn.LoRALinear.from_linear(nn.Linear(5, 3), 7, train="b"))


MESSAGES: list[tuple[Callable[[], object], str]] = [
    (lambda: start(nn.Sequential(nn.Linear(3, 3))), "rac_lora: expected a model with LoRALinear layers, found none"),
    (lambda: start(small_model("both")), "rac_lora: expected layers that train one factor"),
    (lambda: start(small_model("b"), cola), "cola: expected layers that train both factors"),
    (lambda: start(dora_model()), "rac_lora: expected LoRA layers, got a DoRALinear in 0"),
    (lambda: start(nn.Sequential(Foreign())), "whose weights can take a merge, got a Foreign in 0"),
    (lambda: start(quantised_model()), "but 2 cannot: its weight of torch.int8 is quantised"),
    (lambda: start(small_model("b"), steps=0), "steps_per_link of at least 1"),
    (lambda: start(small_model("b"), warmup=6), "warmup between 0 and that, got 5 and 6"),
    (lambda: start(small_model("b"), ranks=()), r"ranks from 1 to the layers' own of 3, one a link, got \[\]"),
    (lambda: start(small_model("b"), ranks=(3, 4)), r"ranks from 1 to the layers' own of 3, one a link, got \[3, 4\]"),
    (lambda: start(small_model("b"), init="zero"), "init to be one of kaiming, gaussian, orthonormal, got 'zero'"),
    (lambda: start(small_model("b"), rounding="up"), "rounding to be one of"),
    (lambda: start(small_model("b"), rounding="stochastic"), "bfloat16 weights for stochastic rounding"),
    (lambda: start(small_model("b", BF16), rounding="stochastic", master=True), "'nearest' with master=True"),
    (lambda: start(wide_by_hand()), "rank of at most 5 for orthonormal samples, got 7 in 0"),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES)
def test_messages(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", [quantised_model, dora_model, lambda: nn.Sequential(Foreign()), wide_by_hand])
def test_a_refused_chain_leaves_model_and_optimizer_alone(make: Callable[[], nn.Module]) -> None:
    model = make()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="rac_lora: expected"):
        rac_lora(model, optimizer, 5)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    optimizer.step()
    assert "chain" not in optimizer.state_dict()


@pytest.mark.parametrize("sampled", ["a", "b"])
def test_federated_average_is_the_average_of_the_models(sampled: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*s, generator=generator, dtype=F64) for s in ((6, 8), (2, 8), (6, 2)))
    shared, other = (a, b) if sampled == "a" else (b, a)
    clients = [other + torch.randn(other.shape, generator=generator, dtype=F64) for _ in range(3)]
    shares = [1.0, 2.0, 5.0]
    models = [w + 0.5 * (c @ a if sampled == "a" else b @ c) for c in clients]
    expected = sum(share / 8 * model for share, model in zip(shares, models, strict=True))
    ours = fed_rac_lora_(w, shared, clients, scaling=0.5, client_weights=shares, sampled=sampled)
    assert ours is w
    torch.testing.assert_close(w, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trained": []}, "one factor and one weight a client, got 0 and 0"),
        ({"client_weights": [1.0, 2.0]}, "got 1 and 2"),
        ({"client_weights": [-1.0]}, "client_weights of at least 0"),
        ({"client_weights": [0.0]}, "not all zero"),
        ({"trained": [torch.zeros(4, 2), torch.zeros(4, 1)]}, "trained factors of one shape"),
        ({"sampled": "c"}, "sampled to be 'a' or 'b'"),
        ({"sampled": None}, "sampled to be 'a' or 'b'"),
        *(({"client_weights": [c]}, "client_weights of at least 0") for c in (math.nan, math.inf, None, "1", True)),
        *(({"scaling": s}, "scaling to be a finite number") for s in (None, math.nan, math.inf, "1", True)),
        *(({"trained": t}, "trained to be a list of tensors") for t in (None, torch.zeros(4, 2), [None])),
        ({"trained": [torch.zeros(4, 2, dtype=torch.int32)]}, "trained factors of floats"),
    ],
)
def test_federated_messages(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises((ValueError, TypeError), match=f"fed_rac_lora_: .*{message}"):
        fed_rac_lora_(torch.zeros(4, 6), torch.zeros(2, 6), **{"trained": [torch.zeros(4, 2)], **arguments})
