"""Layers that save projections: where v comes from, and that nothing but training on it feels them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from lowrank_kernels.init import velora_
from lowrank_kernels.nn import LoRALinear, VeLoRALinear
from lowrank_kernels.reference import velora_project_ref, velora_reconstruct_ref, velora_vector_ref

M, K, N, G = 10, 12, 8, 3


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N).to(dtype)


def lora(dtype: torch.dtype = torch.float32, **settings: Any) -> LoRALinear:
    layer = LoRALinear(linear(dtype), 2, velora=G, **settings)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def dense(dtype: torch.dtype = torch.float32) -> VeLoRALinear:
    return VeLoRALinear(linear(dtype), G)


BOTH = pytest.mark.parametrize("make", [lora, dense])
x, other = torch.randn(2, M, K, generator=torch.Generator().manual_seed(1)) + 0.3


def weight_of(layer: Any) -> nn.Parameter:
    """The parameter whose gradient is made of z."""
    found: nn.Parameter = layer.lora_A.weight if isinstance(layer, LoRALinear) else layer.base_layer.weight
    return found


def grad_of(layer: Any, inputs: Tensor, grad_y: Tensor | None = None) -> Tensor:
    y = layer(inputs)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) if grad_y is None else grad_y
    return torch.autograd.grad(y, weight_of(layer), dy)[0]


def estimate(inputs: Tensor, v: Tensor) -> Tensor:
    return velora_reconstruct_ref(velora_project_ref(inputs, v), v)


@BOTH
def test_the_first_batch_in_training_makes_the_vector_and_later_ones_leave_it(make: Callable[..., Any]) -> None:
    layer = make()
    assert not layer.velora_vector.any()
    grad_of(layer, x)
    v = layer.velora_vector.clone()
    torch.testing.assert_close(v, velora_vector_ref(x, K // G))
    grad_of(layer, other)
    assert torch.equal(layer.velora_vector, v)


@BOTH
def test_the_gradient_is_that_of_the_projected_input(make: Callable[..., Any]) -> None:
    layer = make(torch.float64)
    inputs = x.double()
    ours = grad_of(layer, inputs)
    exact = grad_of(layer.eval(), estimate(inputs, layer.velora_vector))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours, grad_of(layer, inputs))  # in evaluation: exact


@BOTH
@pytest.mark.parametrize("velora", [1, K])
def test_one_sub_token_and_one_for_each_element(make: Callable[..., Any], velora: int) -> None:
    layer = make(torch.float64)
    layer.make_velora_(velora)
    ours = grad_of(layer, x.double())
    exact = grad_of(layer.eval(), x.double())
    assert layer.velora_vector.shape == (K // velora,)
    assert torch.allclose(ours, exact) == (velora == K)


@BOTH
def test_evaluation_and_no_grad_make_no_vector(make: Callable[..., Any]) -> None:
    layer = make()
    with torch.no_grad():
        y = layer(x)
    grad_of(layer.eval(), x)
    assert not layer.velora_vector.any() and not layer.velora_made
    torch.testing.assert_close(layer.train()(x), y)


@BOTH
@pytest.mark.parametrize("bad", [torch.zeros(0, K), torch.full((2, K), float("nan")), torch.full((2, K), float("inf"))])
def test_a_batch_without_a_finite_mean_is_not_the_first(make: Callable[..., Any], bad: Tensor) -> None:
    layer = make()
    layer(bad).sum().backward()
    assert not layer.velora_made
    grad_of(layer, x)
    torch.testing.assert_close(layer.velora_vector, velora_vector_ref(x, K // G))


@BOTH
def test_a_zero_mean_gives_the_uniform_vector_for_good(make: Callable[..., Any]) -> None:
    layer = make()
    grad_of(layer, torch.zeros(2, K))
    grad_of(layer, x)
    torch.testing.assert_close(layer.velora_vector, torch.full((4,), 0.5))


@BOTH
@pytest.mark.parametrize("made_first", [False, True])
def test_a_state_brings_its_vector_in_any_order(make: Callable[..., Any], made_first: bool) -> None:
    layer, again = make(), make()
    grad_of(layer, x)
    if made_first:
        grad_of(again, other)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    grad = grad_of(again, other)
    assert torch.equal(again.velora_vector, layer.velora_vector) and torch.equal(grad, grad_of(layer, other))


@BOTH
def test_a_state_without_a_vector_leaves_it_to_be_made(make: Callable[..., Any]) -> None:
    layer, fresh = make(), make()
    grad_of(layer, x)
    layer.load_state_dict(fresh.state_dict())
    grad_of(layer, other)
    torch.testing.assert_close(layer.velora_vector, velora_vector_ref(other, K // G))


@BOTH
def test_a_copy_keeps_its_own_vector(make: Callable[..., Any]) -> None:
    layer = make()
    before = copy.deepcopy(layer)
    grad_of(layer, x)
    after = copy.deepcopy(layer)
    grad_of(before, other)
    assert torch.equal(after.velora_vector, layer.velora_vector)
    torch.testing.assert_close(before.velora_vector, velora_vector_ref(other, K // G))


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_vector_of_the_first_pass(make: Callable[..., Any], reentrant: bool) -> None:
    plain, recomputed = make(), make()
    inputs = x.clone().requires_grad_()
    plain(inputs).square().sum().backward()
    checkpoint(recomputed, inputs, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(recomputed.velora_vector, plain.velora_vector)
    assert torch.equal(weight_of(recomputed).grad, weight_of(plain).grad)


@BOTH
def test_accumulated_gradients_share_the_vector_of_the_first_part(make: Callable[..., Any]) -> None:
    layer = make(torch.float64)
    both = [part.double() for part in (x, other)]
    (layer(both[0]).sum() + layer(both[1]).sum()).backward()
    v = velora_vector_ref(both[0], K // G)
    exact = sum(grad_of(layer.eval(), estimate(part, v), torch.ones(M, N, dtype=torch.float64)) for part in both)
    torch.testing.assert_close(weight_of(layer).grad, exact)


@BOTH
def test_a_model_cast_to_half_and_one_under_autocast(make: Callable[..., Any]) -> None:
    half, mixed = make(torch.bfloat16), make()
    exact = grad_of(make().eval(), estimate(x, velora_vector_ref(x, K // G)))
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed(x)
    grads = [
        grad_of(half, x.bfloat16()),
        torch.autograd.grad(y, weight_of(mixed), torch.linspace(-1, 1, M * N).view(M, N))[0],
    ]
    for grad in grads:
        assert (grad.float() - exact).norm() < 0.05 * exact.norm()
    assert half.velora_vector.dtype == torch.float32


def test_dropout_projects_what_a_is_multiplied_with() -> None:
    layer = lora(torch.float64, dropout=0.5)
    inputs = x.double()
    layer.set_velora_vector_(inputs)
    torch.manual_seed(3)
    ours = grad_of(layer, inputs)
    torch.manual_seed(3)
    layer.velora = None
    exact = grad_of(layer, inputs)  # s Qᵀ drop(x)
    torch.testing.assert_close(ours, estimate(exact, layer.velora_vector), rtol=1e-10, atol=1e-10)


def test_all_of_a_dense_layer_trains() -> None:
    layer = dense(torch.float64)
    inputs = x.double().requires_grad_()
    layer(inputs).square().sum().backward()
    plain = nn.functional.linear(inputs.detach().requires_grad_(), layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(inputs.grad, 2 * plain @ layer.weight.detach())
    torch.testing.assert_close(layer.bias.grad, 2 * plain.sum(0))


def test_a_frozen_dense_layer_is_the_plain_one() -> None:
    layer = dense()
    layer.requires_grad_(False)
    inputs = x.clone().requires_grad_()
    assert torch.equal(layer(inputs), layer.base_layer(inputs))
    layer(inputs).sum().backward()
    assert layer.weight.grad is None and inputs.grad is not None


@pytest.mark.parametrize("velora", [0, -1, 5, 24, True, 2.0, "4", None])
def test_sub_tokens_that_do_not_fit_are_refused(velora: Any) -> None:
    base = linear()
    makers: list[Callable[[], Any]] = [lambda: VeLoRALinear(base, velora)]
    if velora is not None:
        makers.append(lambda: LoRALinear(base, 2, velora=velora))
    for make in makers:
        with pytest.raises(
            ValueError, match=f"expected velora to be a number of sub-tokens that divides K = {K}, got "
        ):
            make()


def test_what_has_no_projections_says_so() -> None:
    with pytest.raises(ValueError, match="DoRALinear: expected velora to be None, got 3"):
        lk.nn.DoRALinear(linear(), 2, velora=3)
    with pytest.raises(ValueError, match="DoRAConfig: expected velora to be None"):
        lk.DoRAConfig(velora=3)
    with pytest.raises(TypeError, match="cannot be wrapped: already adapted"):
        VeLoRALinear(lora())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down, self.unused = (
            nn.Embedding(9, K),
            nn.Linear(K, 24),
            nn.Linear(24, K),
            nn.Linear(K, K),
        )

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.embed(ids))))
        return y


IDS = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
CONFIGS = [lk.LoRAConfig(r=2, velora=G), lk.VeLoRAConfig(velora=G)]


def batch_of(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"ids": ids} if mask is None else {"ids": ids, "attention_mask": mask}


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    y: Tensor = model(batch["ids"])
    return y


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_vector_made_ahead_leaves_padding_out(config: lk.AdapterConfig) -> None:
    model = Model()
    lk.adapt(model, config)
    model.train()
    assert velora_(model, batch_of(IDS, MASK), run) == ["unused"]
    assert model.training and not model.up._forward_pre_hooks
    kept = model.embed(IDS)[MASK.bool()]
    torch.testing.assert_close(model.up.velora_vector, velora_vector_ref(kept.detach(), K // G))
    made = model.down.velora_vector.clone()
    model(IDS).sum().backward()
    assert torch.equal(model.down.velora_vector, made)
    with_padding = Model()
    lk.adapt(with_padding, config)
    velora_(with_padding, batch_of(IDS), run)
    assert not torch.allclose(with_padding.up.velora_vector, model.up.velora_vector)


def test_a_model_without_projections_is_refused() -> None:
    with pytest.raises(ValueError, match="velora_: expected a model with velora in its layers, found none in Model"):
        velora_(Model(), batch_of(IDS), run)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_adapt_reports_and_undoes_and_unloads(config: lk.AdapterConfig) -> None:
    model = Model()
    flags, names = [p.requires_grad for p in model.parameters()], list(model.state_dict())
    report = lk.adapt(model, config)
    assert {r.name for r in report.replaced} == {"up", "down", "unused"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(config, lk.VeLoRAConfig):
        assert trained == {f"{m}.base_layer.{p}" for m in ("up", "down", "unused") for p in ("weight", "bias")}
        assert "all of W, 3 sub-tokens" in str(report)
    else:
        assert trained == {f"{m}.lora_{f}.weight" for m in ("up", "down", "unused") for f in "AB"}
    copied = copy.deepcopy(model)
    expected = copied(IDS)
    plain = lk.merge_and_unload(copied)
    torch.testing.assert_close(plain(IDS), expected)
    assert list(plain.state_dict()) == names
    report.undo()
    assert [p.requires_grad for p in model.parameters()] == flags and list(model.state_dict()) == names


@pytest.mark.parametrize("config", [lk.LoRAConfig(r=2, velora=5), lk.VeLoRAConfig(velora=5)])
def test_adapt_refuses_a_number_that_does_not_divide_and_leaves_the_model(config: lk.AdapterConfig) -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"to divide K = 12 of up, got 5; take another divisor"):
        lk.adapt(model, config)
    assert type(model.up) is nn.Linear


def test_an_adapter_file_is_an_ordinary_one(tmp_path: Any) -> None:
    model = Model()
    lk.adapt(model, lk.LoRAConfig(r=2, velora=G))
    model.train()
    nn.init.normal_(model.up.lora_B.weight)
    model(IDS).sum().backward()
    lk.save_adapter(model, tmp_path)
    again = Model()
    lk.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(IDS), model(IDS))
    assert again.up.velora is None


def test_a_hooked_factor_keeps_x_and_its_exact_gradient() -> None:
    layer = lora(torch.float64)
    layer.lora_A.register_forward_hook(lambda *_: None)
    ours = grad_of(layer, x.double())
    torch.testing.assert_close(ours, grad_of(layer.eval(), x.double()))
