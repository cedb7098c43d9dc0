"""Whatever changes the parameters, optimizers, averages or loads, a layer computes its formula on what they are now."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lowrank_kernels.nn import BlockSparseLinear, DoRALinear, LoRALinear, MultiLoRALinear

K, N, R = 64, 128, 32
POSITIONS = torch.tensor([(i, j) for i in range(8) for j in range(4) if (3 * i + j) % 4 < 2])  # in the layer's order
IDS = torch.arange(20) % 3
RANKS = (3, 24, 5)
X = torch.randn(20, K, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(20, N, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------------------------------------------- the layers


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, dtype=dtype)


def away_from_its_start(layer: nn.Module) -> nn.Module:
    """A B that is not 0, so that A gets gradients from the first step on."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return layer


def make_smt(dtype: torch.dtype = torch.float32) -> nn.Module:
    return BlockSparseLinear.from_linear(linear(dtype), POSITIONS, 16)


def make_peft_dora() -> nn.Module:
    """One layer of a PEFT model, in evaluation."""
    peft = pytest.importorskip("peft")
    from lowrank_kernels.integrations.peft import accelerate

    config = peft.LoraConfig(r=R, use_dora=True, target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(nn.Sequential(linear()), config)
    accelerate(model)
    return away_from_its_start(model.base_model.model[0]).eval()


def dora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float, m: Tensor) -> Tensor:
    v = w + s * b @ a
    return x @ (m[:, None] * v / v.norm(dim=1, keepdim=True)).T


def formula(layer: Any, x: Tensor) -> Tensor:
    """y in float64 from the layer's parameters, and nothing else that it holds."""
    x = x.double()
    p = {name: t.detach().double() for name, t in layer.named_parameters()}
    w, bias = p["base_layer.weight"], p["base_layer.bias"]
    if isinstance(layer, BlockSparseLinear):
        w = linear(layer.base_layer.weight.dtype).weight.detach().double()
        for (i, j), block in zip(POSITIONS.tolist(), layer.blocks.detach(), strict=True):
            w[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = block.to(layer.base_layer.weight.dtype)
        return x @ w.T + bias
    if isinstance(layer, MultiLoRALinear):
        y, start = torch.empty(len(x), N, dtype=torch.float64), 0
        for i, rank in enumerate(RANKS):
            a, b = p["lora_A"][start : start + rank], p["lora_B"][start : start + rank].T
            rows = IDS[: len(x)] == i
            y[rows] = dora(x[rows], w, a, b, 16.0 / rank, p["lora_magnitude"][i])
            start += rank
        return y + bias
    if isinstance(layer, LoRALinear):
        a, b = p["lora_A.weight"], p["lora_B.weight"]
        if isinstance(layer, DoRALinear):
            return dora(x, w, a, b, layer.scaling, p["lora_magnitude_vector"]) + bias
        return x @ (w + layer.scaling * b @ a).T + bias
    a, b, m = (p[f"lora_{key}"] for key in ("A.default.weight", "B.default.weight", "magnitude_vector.default.weight"))
    return dora(x, w, a, b, layer.scaling["default"], m) + bias


def make_dora(**settings: Any) -> nn.Module:
    return away_from_its_start(DoRALinear(linear(), R, **settings))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lambda: away_from_its_start(LoRALinear(linear(), R)),
    "DoRA": make_dora,
    "DoRA in evaluation": lambda: make_dora().eval(),
    "DoRA through the norm": lambda: make_dora(detach_norm=False),
    "DoRA of PEFT": make_peft_dora,
    "many DoRA": lambda: away_from_its_start(MultiLoRALinear.from_linear(linear(), RANKS, dora=True)),
    "SMT": make_smt,
    "SMT in bfloat16": lambda: make_smt(torch.bfloat16),
}


def call(layer: Any, x: Tensor) -> Tensor:
    x = x.to(layer.base_layer.weight.dtype)
    return layer(x, IDS[: len(x)]) if isinstance(layer, MultiLoRALinear) else layer(x)


def assert_fresh(layer: Any, before: Tensor) -> Tensor:
    """y is that of the parameters as they are, which is not the one from before; with gradients and without, of many
    rows and of few. Returns y in float64."""
    expected = formula(layer, X)
    half = layer.base_layer.weight.dtype == torch.bfloat16
    bound = (0.02 if half else 1e-5) * expected.abs().max()
    assert (expected - before).abs().max() > (0 if half else 10) * bound
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for rows in (20, 2):
                assert (call(layer, X[:rows]).double() - expected[:rows]).abs().max() <= bound
    if isinstance(layer, BlockSparseLinear):
        weight = layer.base_layer.weight
        for (i, j), block in zip(POSITIONS.tolist(), layer.blocks, strict=True):
            assert torch.equal(weight[16 * i : 16 * i + 16, 16 * j : 16 * j + 16], block.to(weight.dtype))
    return expected


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def loss_of(layer: nn.Module) -> Tensor:
    return (call(layer, X).float() - TARGET).square().mean()


def one_step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(layer)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def fused_adamw(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(layer), lr=0.02, fused=True)


# ------------------------------------------------------------------------------------------------------ the optimizers

SETTINGS: dict[str, dict[str, Any]] = {
    "Adadelta": {"lr": 5.0},
    "ASGD": {"lr": 0.5},
    "LBFGS": {"lr": 0.5, "max_iter": 1},
    "SGD": {"lr": 0.5, "momentum": 0.9},
}


def every_way() -> Iterator[Any]:
    """(class, settings) of each optimizer of torch's, with foreach, fused and neither."""
    for name, kind in sorted(vars(torch.optim).items()):
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            continue
        if name == "SparseAdam":  # sparse gradients alone
            continue
        settings, takes = SETTINGS.get(name, {"lr": 0.02}), inspect.signature(kind).parameters
        yield pytest.param(kind, settings | ({"foreach": False} if "foreach" in takes else {}), id=name)
        for way in ("foreach", "fused"):
            if way in takes:
                yield pytest.param(kind, settings | {way: True}, id=f"{name}-{way}")


@pytest.mark.parametrize(("kind", "settings"), list(every_way()))
@pytest.mark.parametrize("layer_kind", LAYERS)
def test_after_every_step_of_any_optimizer(layer_kind: str, kind: Any, settings: dict[str, Any]) -> None:
    layer = LAYERS[layer_kind]()
    trains = trained(layer)
    if kind.__name__ == "Muon":  # matrices alone
        trains = [p for p in trains if p.dim() == 2]
        if not trains:
            pytest.skip("blocks are no matrices, which Muon wants")
    optimizer, y = kind(trains, **settings), formula(layer, X)
    for _ in range(4):
        one_step(layer, optimizer)
        y = assert_fresh(layer, y)


@pytest.mark.parametrize(
    "name",
    [
        *(f"bitsandbytes.optim.{name}" for name in ("AdamW8bit", "Lion8bit", "PagedAdamW", "PagedAdamW8bit")),
        *(f"torchao.optim.{name}" for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")),
    ],
)
@pytest.mark.parametrize("layer_kind", LAYERS)
def test_after_every_step_of_optimizers_of_other_packages(layer_kind: str, name: str) -> None:
    package, _, kind = name.rpartition(".")
    kind = getattr(pytest.importorskip(package), kind)
    settings = {"min_8bit_size": 256} if "min_8bit_size" in inspect.signature(kind).parameters else {}
    layer = LAYERS[layer_kind]()
    optimizer, y = kind(trained(layer), lr=0.02, **settings), formula(layer, X)
    with torch.compiler.set_stance("force_eager"):  # torchao's steps are compiled, which takes a minute each
        for _ in range(4):
            one_step(layer, optimizer)
            y = assert_fresh(layer, y)


@pytest.mark.parametrize("layer_kind", LAYERS)
def test_a_step_inside_backward(layer_kind: str) -> None:
    """An optimizer of its own for each parameter, which steps as soon as the gradient is there."""
    layer = LAYERS[layer_kind]()
    y = formula(layer, X)
    for p in trained(layer):
        own = torch.optim.AdamW([p], lr=0.02, fused=True)

        def step(p: Tensor, own: torch.optim.Optimizer = own) -> None:
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        loss_of(layer).backward()
        y = assert_fresh(layer, y)


# -------------------------------------------------------------------------------------------------------- the averages


class Average(NamedTuple):
    module: nn.Module
    update: Callable[[nn.Module], None]


def of_torch(use_buffers: bool, multi_avg_fn: Any) -> Callable[[nn.Module], Average]:
    def start(layer: nn.Module) -> Average:
        average = AveragedModel(layer, use_buffers=use_buffers, multi_avg_fn=multi_avg_fn)
        average.update_parameters(layer)  # the first update copies
        return Average(average.module, average.update_parameters)

    return start


def by_hand(write: Callable[[nn.Module, nn.Module], None]) -> Callable[[nn.Module], Average]:
    def start(layer: nn.Module) -> Average:
        average = copy.deepcopy(layer)
        return Average(average, lambda layer: write(average, layer))

    return start


def of_states(average: nn.Module, layer: nn.Module) -> None:
    """timm's ModelEmaV2: all that a state dict holds, integers too."""
    with torch.no_grad():
        for e, v in zip(average.state_dict().values(), layer.state_dict().values(), strict=True):
            e.copy_(0.9 * e + (1.0 - 0.9) * v)


def of_data(average: nn.Module, layer: nn.Module) -> None:
    for e, p in zip(average.parameters(), layer.parameters(), strict=True):
        e.data.mul_(0.9).add_(p.data, alpha=0.1)


def of_lists(average: nn.Module, layer: nn.Module) -> None:
    """As diffusers' and torch_ema's foreach."""
    with torch.no_grad():
        own, theirs = list(average.parameters()), list(layer.parameters())
        if len({p.dtype for p in own}) > 1:
            return of_data(average, layer)
        torch._foreach_sub_(own, torch._foreach_mul(torch._foreach_sub(own, theirs), 0.1))


AVERAGES = {
    "EMA": of_torch(False, get_ema_multi_avg_fn(0.9)),
    "EMA, buffers too": of_torch(True, get_ema_multi_avg_fn(0.9)),
    "SWA": of_torch(False, get_swa_multi_avg_fn()),
    "SWA, buffers too": of_torch(True, get_swa_multi_avg_fn()),
    "one by one, buffers too": of_torch(True, None),
    "state dicts": by_hand(of_states),
    "data": by_hand(of_data),
    "lists": by_hand(of_lists),
}


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("layer_kind", LAYERS)
def test_an_average_that_follows_the_training(layer_kind: str, kind: str) -> None:
    layer = LAYERS[layer_kind]()
    optimizer, average = fused_adamw(layer), AVERAGES[kind](layer)
    y, of_layer = formula(average.module, X), formula(layer, X)
    for _ in range(6):
        one_step(layer, optimizer)
        average.update(layer)
        y = assert_fresh(average.module, y)
        of_layer = assert_fresh(layer, of_layer)


@pytest.mark.parametrize("write", ["copy_", "data", "swap", "foreach"])
@pytest.mark.parametrize("layer_kind", LAYERS)
def test_an_average_put_in_and_taken_out_again(layer_kind: str, write: str) -> None:
    def put(values: list[Tensor]) -> None:
        with torch.no_grad():
            if write == "foreach":
                torch._foreach_copy_(trained(layer), values)
                return
            for p, value in zip(trained(layer), values, strict=True):
                if write == "copy_":
                    p.copy_(value)
                elif write == "data":
                    p.data.copy_(value)
                else:
                    p.data = value

    layer = LAYERS[layer_kind]()
    optimizer, shadow, y = fused_adamw(layer), [p.detach().clone() for p in trained(layer)], formula(layer, X)
    for _ in range(3):
        one_step(layer, optimizer)
        y = assert_fresh(layer, y)
        kept = [p.detach().clone() for p in trained(layer)]
        put([torch.lerp(e, p, 0.1) for e, p in zip(shadow, kept, strict=True)])
        assert_fresh(layer, y)
        put(kept)
        assert torch.equal(assert_fresh(layer, formula(layer, X) + 1), y)


# ----------------------------------------------------------------------------------------------------------- the loads


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layer_kind", LAYERS)
def test_a_state_loaded_amid_training(layer_kind: str, assign: bool) -> None:
    layer, other = LAYERS[layer_kind](), LAYERS[layer_kind]()
    optimizer, of_other = fused_adamw(layer), fused_adamw(other)
    for _ in range(4):
        one_step(other, of_other)
    one_step(layer, optimizer)
    y = formula(layer, X)
    layer.load_state_dict({key: t.clone() for key, t in other.state_dict().items()}, assign=assign)
    y = assert_fresh(layer, y)
    assert torch.equal(y, formula(other, X))
    optimizer = fused_adamw(layer)  # assigned parameters are others
    for _ in range(3):
        one_step(layer, optimizer)
        y = assert_fresh(layer, y)
