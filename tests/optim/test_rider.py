"""What rides on an optimizer: when it is called, what it finds then, and how it is saved, found and taken off."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lowrank_kernels.rider import Rider


class Taker(Rider):
    """Takes the gradient of one parameter away from the optimizer and makes a step of its own with it."""

    key: ClassVar[str] = "taker"
    reads_gradients: ClassVar[bool] = True

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        super().__init__(optimizer, "Taker")
        self.parameter, self.taken, self.steps = parameter, None, 0
        self.attach()

    def before_step(self) -> None:
        self.taken, self.parameter.grad = self.parameter.grad, None

    def restore(self) -> None:
        if self.taken is not None:
            self.own, self.taken, self.parameter.grad = self.taken / self.gradient_scale(), None, self.taken

    @torch.no_grad()
    def after_step(self) -> None:
        self.parameter.sub_(self.own, alpha=0.5)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def check_state(self, state: dict[str, Any]) -> None:
        if state["steps"] < 0:
            raise ValueError("Taker: expected a number of steps of at least 0")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]


class Counter(Rider):
    key: ClassVar[str] = "accountant"
    calls = 0

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, "Counter")
        self.attach()

    def after_step(self) -> None:
        self.calls += 1


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)) for _ in range(2)]


def test_a_gradient_that_is_taken_away_is_stepped_by_the_rider_alone_and_put_back() -> None:
    left, taken = parameters()
    optimizer = torch.optim.SGD([left, taken], lr=0.1)
    rider = Taker(optimizer, taken)
    left.grad, taken.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(left, torch.full((3,), 0.9)) and torch.equal(taken, torch.full((3,), 0.5))
    assert torch.equal(taken.grad, torch.ones(3)) and rider.steps == 1


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_rider_that_reads_gradients_comes_after_the_closure(as_keyword: bool) -> None:
    left, taken = parameters()
    optimizer = torch.optim.SGD([left, taken], lr=0.1)
    Taker(optimizer, taken)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = left.sum() + taken.sum()
        loss.backward()
        return loss.detach()

    loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert loss == 6
    assert torch.equal(left, torch.full((3,), 0.9)) and torch.equal(taken, torch.full((3,), 0.5))


def test_a_step_that_raises_puts_back_and_does_not_count() -> None:
    left, taken = parameters()
    optimizer = torch.optim.SGD([left, taken], lr=0.1)
    rider = Taker(optimizer, taken)
    left.grad, taken.grad = torch.ones(3), torch.ones(3)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert torch.equal(taken.grad, torch.ones(3)) and rider.steps == 0
    handle.remove()
    optimizer.step()
    assert rider.steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_gradients_are_scaled_and_skipped_steps_are_none(fused: bool) -> None:
    left, taken = parameters()
    optimizer = torch.optim.SGD([left, taken], lr=0.1, fused=fused)
    rider = Taker(optimizer, taken)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for finite in (False, True):
        optimizer.zero_grad()
        scaler.scale((left.sum() + taken.sum()) * (1.0 if finite else float("inf"))).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(left, torch.full((3,), 0.9)) and torch.equal(taken, torch.full((3,), 0.5))
    assert rider.steps == 1


def test_its_state_is_the_optimizers_whenever_either_is_made() -> None:
    left, taken = parameters()
    optimizer = torch.optim.SGD([left, taken], lr=0.1)
    Taker(optimizer, taken).steps = 7
    state = copy.deepcopy(optimizer.state_dict())
    for loaded_first in (True, False):
        other = torch.optim.SGD(parameters(), lr=0.1)
        if loaded_first:
            other.load_state_dict(state)
        rider = Taker(other, other.param_groups[0]["params"][1])
        if not loaded_first:
            other.load_state_dict(state)
        assert rider.steps == 7 and "taker" not in other.param_groups[0]
    state["param_groups"][0]["taker"]["steps"] = -1
    with pytest.raises(ValueError, match="Taker: expected a number of steps"):
        other.load_state_dict(state)
    assert rider.steps == 7


def test_riders_of_two_kinds_ride_on_one_optimizer_and_two_of_a_kind_do_not() -> None:
    left, taken = parameters()
    optimizer = torch.optim.SGD([left, taken], lr=0.1)
    taker, counter = Taker(optimizer, taken), Counter(optimizer)
    left.grad, taken.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert (taker.steps, counter.calls) == (1, 1)
    assert optimizer.state_dict()["param_groups"][0].keys() >= {"taker", "accountant"}
    with pytest.raises(ValueError, match="Counter: expected an optimizer without an accountant, got one that has one"):
        Counter(optimizer)
    taker.detach()
    optimizer.step()
    assert (taker.steps, counter.calls) == (1, 2) and "taker" not in optimizer.state_dict()["param_groups"][0]
    assert Taker(optimizer, taken).steps == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, r"optimizer to be a torch.optim.Optimizer, got NoneType"),
        (lambda: torch.optim.LBFGS(parameters()), ValueError, "got LBFGS, whose history"),
    ],
)
def test_what_cannot_be_ridden_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Counter: expected .*{message}"):
        Counter(make())


def test_an_optimizer_that_is_wrapped_is_refused() -> None:
    inner = torch.optim.SGD(parameters(), lr=0.1)
    outer = copy.copy(inner)
    outer.optimizer = inner  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="Counter: expected optimizer to be the one that steps, got a SGD around it"):
        Counter(outer)
