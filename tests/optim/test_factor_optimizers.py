"""What every optimizer of factor pairs must do: be a torch optimizer, resumable, without a synchronisation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.optim import LoRAPro, LoRARITE, factor_groups
from lowrank_kernels.optim.factors import factor_pairs

OPTIMIZERS = {
    "pro": lambda groups: LoRAPro(groups, lr=1e-2),
    "pro, full": lambda groups: LoRAPro(groups, lr=1e-3, moments="full"),
    "rite": lambda groups: LoRARITE(groups, lr=1e-3, weight_decay=0.01),
}
BF16, F32 = torch.bfloat16, torch.float32


def model_of(dtype: torch.dtype = F32, config: lk.LoRAConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20), nn.Linear(20, 3)]
    model = nn.Sequential(*layers)
    lk.adapt(model, config or lk.LoRAConfig(r=3, alpha=6, dtype=dtype, bias="lora_only"))
    return model


def give_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    loss = (model(torch.randn(16, 12)) - torch.randn(16, 3)).square().mean()
    model.zero_grad()
    loss.backward()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = model_of(dtype)
    optimizer = OPTIMIZERS[name](factor_groups(model))
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = model_of(dtype)
    other.load_state_dict(saved["model"])
    again = OPTIMIZERS[name](factor_groups(other))
    again.load_state_dict(saved["optimizer"])
    states = [t for state in again.state.values() for t in state.values()]
    assert states and all(t.dtype == F32 for t in states)
    for seed in range(3, 6):
        for m, o in ((model, optimizer), (other, again)):
            give_gradients(m, seed)
            o.step()
    for p, q in zip(trained(model), trained(other), strict=True):
        assert torch.equal(p, q)
    twin_model, twin = copy.deepcopy((other, again))
    for m, o in ((other, again), (twin_model, twin)):
        give_gradients(m, 7)
        o.step()
    for p, q in zip(trained(other), trained(twin_model), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_in_a_batch_step_as_alone(name: str) -> None:
    """Also when one of them has no gradient for a while, and in groups of their own."""
    together, alone = model_of(), model_of()
    one = OPTIMIZERS[name](factor_groups(together))
    groups = [{"params": [a, b], "scaling": [s]} for a, b, s in factor_pairs(alone)]
    groups.append({"params": [p for n, p in alone.named_parameters() if n.endswith("bias")]})
    several = OPTIMIZERS[name](groups)
    for seed in range(5):
        for m, o in ((together, one), (alone, several)):
            give_gradients(m, seed)
            if seed == 2:
                m[2].lora_A.weight.grad = None
            o.step()
    for (n, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-6, msg=n)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_lowers_the_loss_and_dora_trains_too(name: str) -> None:
    for config in (lk.LoRAConfig(r=3, alpha=6), lk.DoRAConfig(r=3, alpha=6)):
        model = model_of(config=config)
        optimizer = OPTIMIZERS[name](factor_groups(model))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))
        x, y = torch.randn(64, 12), torch.randn(64, 3)
        losses = []
        for _ in range(60):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_compiles(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5), (4, 2))]
    results = []
    for compiled in (False, True):
        params = [nn.Parameter(t.clone()) for t in start]
        for p in params:
            p.grad = p.detach().cos()
        optimizer = OPTIMIZERS[name]([{"params": params, "scaling": [0.5]}])
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        step()
        step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    """On meta tensors nothing can be read back: whatever asked for a value would raise."""
    model = model_of().to("meta")
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer = OPTIMIZERS[name](factor_groups(model))
    optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_move_nothing(name: str) -> None:
    model = model_of()
    optimizer = OPTIMIZERS[name]([{**group, "weight_decay": 0.0} for group in factor_groups(model)])
    before = [p.detach().clone() for p in trained(model)]
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(model), before, strict=True))


def test_the_factor_groups_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    (group,) = factor_groups(wrapped)
    assert [tuple(p.shape) for p in group["params"]] == [(2, 8), (6, 2), (2, 6), (8, 2)]
    assert group["scaling"] == [3.0, 3.0]


def pair(r: int = 2, k: int = 5, n: int = 4, **options: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(r, k)), nn.Parameter(torch.zeros(n, r, **options))]


MESSAGES = [
    (lambda: LoRAPro(pair()), "expected groups with pairs of factors; use factor_groups"),
    (lambda: LoRAPro([{"params": pair()[:1], "scaling": [1.0]}]), "params as A, B, A, B"),
    (lambda: LoRAPro([{"params": pair(), "scaling": [1.0, 2.0]}]), "one scaling a pair"),
    (lambda: LoRAPro([{"params": pair()[::-1], "scaling": [1.0]}]), r"pairs A \(R, K\), B \(N, R\)"),
    (lambda: LoRARITE([{"params": pair(dtype=BF16), "scaling": [1.0]}]), "of one dtype and device"),
    (lambda: LoRARITE([{"params": pair(r=5), "scaling": [1.0]}]), r"rank of at most min\(N, K\) = 4, got 5"),
    (lambda: LoRARITE([{"params": pair(), "scaling": [1.0]}], lr=-1.0), "expected lr of at least 0"),
    (lambda: LoRAPro([{"params": pair(), "scaling": [1.0]}], moments="some"), "moments to be one of factors, full"),
    (lambda: factor_groups(nn.Linear(3, 3)), "expected LoRA layers that train, found none in Linear"),
    (lambda: factor_groups(model_of(config=lk.LoRAConfig(r=2, train="b"))), "both factors of a layer to train"),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES)
def test_messages(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
