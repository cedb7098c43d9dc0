"""A weight that is stored transposed: a format of this file alone, which every op, layer and the bank take."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.ops.lora import LoRALinear
from lowrank_kernels.ops.planning import plan
from lowrank_kernels.weights import FORMATS, FrozenWeight, dense, of, register, rows

DTYPES = (torch.float32, torch.bfloat16)
M, K, N, R = 9, 48, 40, 4


class TransposedWeight(FrozenWeight):
    """W as Wᵀ (K, N), contiguous."""

    format = "transposed"

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored
        self.shape, self.dtype = torch.Size(reversed(stored.shape)), stored.dtype
        self.read: list[str] = []

    def parts(self) -> Sequence[Tensor]:
        return [self.stored]

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor], settings: str) -> TransposedWeight:
        return cls(parts[0])

    @classmethod
    def from_module(cls, module: nn.Module) -> TransposedWeight | None:
        return cls(module.weight.detach()) if isinstance(module, TransposedLinear) else None

    def dense(self) -> Tensor:
        self.read.append("dense")
        return self.stored.T.contiguous()

    def rows(self, start: int, stop: int) -> Tensor:
        self.read.append("rows")
        return self.stored[:, start:stop].T.contiguous()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.read.append("product")
        y = x @ self.stored
        return y if bias is None else y + bias.to(y.dtype)

    def grad_product(self, grad_y: Tensor) -> Tensor:
        self.read.append("grad_product")
        return grad_y @ self.stored.T


class TransposedLinear(nn.Module):
    """What a package of that format might put in place of an nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


@pytest.fixture(autouse=True)
def toy_format() -> Iterator[None]:
    register(TransposedWeight)
    yield
    del FORMATS["transposed"]


def operands(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
    made = {name: (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(dtype) for name, size in sizes.items()}
    return {name: t if name == "weight" else t.requires_grad_() for name, t in made.items()}


def as_stored(weight: Tensor) -> TransposedWeight:
    return TransposedWeight(weight.T.contiguous())


def stack_of(lora_a: Tensor, lora_b: Tensor, *magnitude: Tensor) -> lk.LoRAStack:
    return lk.LoRAStack.from_factors([(lora_a.detach(), lora_b.detach(), 0.5, *magnitude)])


CALLS: dict[str, Any] = {
    "lora": lambda x, w, a, b: lk.lora_linear(x, w, a, b, scaling=0.5),
    "lora, dropout": lambda x, w, a, b: lk.lora_linear(x, w, a, b, scaling=0.5, dropout_p=0.3, dropout_seed=1),
    "dora": lambda x, w, a, b: lk.dora_linear(x, w, a, b, torch.ones(N), scaling=0.5),
    "dora, full gradients": lambda x, w, a, b: lk.dora_linear(x, w, a, b, torch.ones(N), detach_norm=False),
    "dora, base dropped": lambda x, w, a, b: lk.dora_linear(
        x, w, a, b, torch.ones(N), dropout_p=0.3, dropout_seed=1, dropout_base=True
    ),
    "norm": lambda x, w, a, b: lk.functional.dora_weight_norm(w, a, b, scaling=0.5),
    "importance, rows": lambda x, w, a, b: x.sum() * lk.lora_importance(w, a, b, a, b),
    "importance, columns": lambda x, w, a, b: x * lk.lora_importance(w, a, b, a, b, dim="columns"),
    "many": lambda x, w, a, b: lk.multi_lora_linear(x, w, stack_of(a, b), torch.zeros(M, dtype=torch.int64)),
    "many, dora": lambda x, w, a, b: lk.multi_lora_linear(
        x, w, stack_of(a, b, torch.ones(N)), torch.zeros(M, dtype=torch.int64)
    ),
    "reference": lambda x, w, a, b: lk.lora_linear(x, w, a, b, scaling=0.5, backend="reference"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_every_op_takes_it_as_it_takes_the_dense_weight(name: str, dtype: torch.dtype) -> None:
    call, (ours, known) = CALLS[name], (operands(dtype) for _ in range(2))
    y = call(ours["x"], as_stored(ours["weight"]), ours["lora_a"], ours["lora_b"])
    exact = call(known["x"], known["weight"], known["lora_a"], known["lora_b"])
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(y, exact, **close)
    grad = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    y.backward(grad)
    exact.backward(grad)
    for tensor, other in zip(ours.values(), known.values(), strict=True):
        assert (tensor.grad is None) == (other.grad is None)
        if other.grad is not None:
            torch.testing.assert_close(tensor.grad, other.grad, **close)


def test_without_gradients_too() -> None:
    t = operands(torch.float32)
    with torch.no_grad():
        for name in ("lora", "dora", "many"):
            y = CALLS[name](t["x"], as_stored(t["weight"]), t["lora_a"], t["lora_b"])
            torch.testing.assert_close(y, CALLS[name](t["x"], t["weight"], t["lora_a"], t["lora_b"]))


def test_ops_multiply_by_its_own_products_and_never_make_it_dense() -> None:
    t = operands(torch.float32)
    weight = as_stored(t["weight"])
    lk.lora_linear(t["x"], weight, t["lora_a"], t["lora_b"]).sum().backward()
    assert weight.read == ["product", "grad_product"]
    weight.read.clear()
    lk.dora_linear(t["x"], weight, t["lora_a"], t["lora_b"], torch.ones(N)).sum().backward()
    assert weight.read == ["rows", "product", "grad_product"]


def test_a_plan_says_who_multiplies() -> None:
    t = operands(torch.float32)
    call = LoRALinear(
        t["x"], as_stored(t["weight"]), t["lora_a"], t["lora_b"], None, None, 1.0, 0.0, None, False, "cpu"
    )
    made = plan("lora_linear", call)
    assert (
        made.base == "library"
        and ("base", "library", "rule: transposed weights multiply by themselves") in made.reasons
    )


def test_checks_are_those_of_a_dense_weight() -> None:
    t = operands(torch.float32)
    with pytest.raises(ValueError, match=r"expected x of shape \(..., K\) = \(..., 48\)"):
        lk.lora_linear(t["x"][:, 1:], as_stored(t["weight"]), t["lora_a"], t["lora_b"])
    with pytest.raises(TypeError, match="expected x and weight of one dtype"):
        lk.lora_linear(t["x"].bfloat16(), as_stored(t["weight"]), t["lora_a"], t["lora_b"])


def test_it_is_compiled_with_the_op_whole() -> None:
    t = operands(torch.float32)
    weight = as_stored(t["weight"])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, stored: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lk.lora_linear(x, TransposedWeight(stored), a, b)

    y = compiled(t["x"], weight.stored, t["lora_a"], t["lora_b"])
    torch.testing.assert_close(y, lk.lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"]))
    y.sum().backward()
    assert t["lora_a"].grad is not None


def test_rows_and_dense_are_the_weight() -> None:
    weight = operands(torch.bfloat16)["weight"]
    assert torch.equal(dense(as_stored(weight)), weight)
    assert torch.equal(rows(as_stored(weight), 3, 11), weight[3:11])


class Model(nn.Module):
    def __init__(self, stored: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.first, self.second = (TransposedLinear(m) if stored else m for m in (first, second))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


CONFIGS = [lk.LoRAConfig(r=4), lk.DoRAConfig(r=4)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_model_of_such_linears_is_adapted_trained_and_saved(config: Any, tmp_path: Path) -> None:
    models = [Model(stored) for stored in (True, False)]
    x = torch.randn(M, K)
    for model in models:
        torch.manual_seed(1)
        report = lk.adapt(model, config)
        assert [r.name for r in report.replaced] == ["first", "second"]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-4, atol=1e-5)
    lk.save_adapter(models[0], tmp_path)
    again = Model(stored=True)
    lk.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), models[0](x))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_bank_serves_over_it(config: Any, tmp_path: Path) -> None:
    trained, x = Model(stored=True), torch.randn(3, 1, K)
    base = trained(x)
    lk.adapt(trained, config)
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    lk.save_adapter(trained, tmp_path)
    bank = lk.serving.AdapterBank(served := Model(stored=True))
    bank.load("a", tmp_path)
    with torch.no_grad(), bank.batch(["a", None, "a"]):
        y = served(x)
    torch.testing.assert_close(y[[0, 2]], trained(x)[[0, 2]])
    torch.testing.assert_close(y[1], base[1])


def test_merging_into_it_is_refused_and_changes_nothing() -> None:
    model = Model(stored=True)
    lk.adapt(model, lk.LoRAConfig(r=4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"LoRALinear.merge_: expected a dense weight.*transposed"):
        model.first.merge_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_formats_name_is_its_own() -> None:
    with pytest.raises(ValueError, match="expected a new format's name, got 'transposed' again"):
        register(TransposedWeight)


def test_no_format_knows_a_plain_linear() -> None:
    assert of(nn.Linear(2, 3)) is None
