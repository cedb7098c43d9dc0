"""Plans for a GPU whose hardware copies tiles, run in the interpreter: it refuses descriptors that hardware would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import tuned
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.kernels.target import TARGETS
from lowrank_kernels.ops import planning
from lowrank_kernels.ops.lora import LoRALinear, LoRALinearBackward
from tests.fuzz.check import faults
from tests.problems import differentiate, leaves
from tests.problems.dora import dora_problem, dora_tensors
from tests.problems.lora import BF16, lora_problem, lora_tensors
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

F64 = torch.float64
M, K, N, R = 8, 67, 48, 8
CASES, CHUNK = 100, 20


@pytest.fixture(autouse=True)
def planned_for_sm_90(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every plan is one for sm_90, of three processors: persistent programs take several tiles each."""
    target = replace(TARGETS["sm_90"], num_sms=3)
    monkeypatch.setattr(planning, "target_of", lambda device: target)
    tuned.forget()
    yield
    tuned.forget()


def apart(t: Tensor, by: int) -> Tensor:
    """The same values, rows ``by`` elements apart."""
    return torch.full((t.shape[0], by), torch.nan, dtype=t.dtype)[:, : t.shape[1]].copy_(t)


def operands() -> dict[str, Tensor]:
    """K is odd, and rows begin at multiples of 16 bytes: as they lie they have descriptors, and copies have not."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "grad_y": (M, N)}
    t = {name: torch.randn(shape, generator=generator).to(BF16) for name, shape in shapes.items()}
    return {name: apart(value, 72) if value.shape[1] == K else value for name, value in t.items()}


def tma_of_lora_linear(t: dict[str, Tensor]) -> tuple[bool, bool]:
    """Whether plans ask for descriptors, of a forward and of its backward."""
    factors = t["weight"], t["lora_a"], t["lora_b"]
    forward = LoRALinear(t["x"], *factors, None, None, 0.5, 0.0, None, True, "triton")
    needs = (True, True, True, False, False)
    backward = LoRALinearBackward(t["grad_y"], t["x"], *factors, None, None, 0.5, 0.0, None, needs, "triton")
    of_forward = planning.plan("lora_linear", forward).tiles.main.tma
    return of_forward, planning.plan("lora_linear_backward", backward).tiles.main_dx.tma


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", (False, True)),
        ("weight", (False, False)),
        ("lora_a", (False, True)),
        ("lora_b", (True, True)),
        ("grad_y", (True, False)),
    ],
)
def test_one_operand_that_can_have_none_is_enough(name: str, expected: tuple[bool, bool]) -> None:
    t = operands() | {"x": torch.randn(M, 64).to(BF16)}
    t |= {"weight": torch.randn(N, 64).to(BF16), "lora_a": torch.randn(R, 64).to(BF16)}
    assert tma_of_lora_linear(t) == (True, True)
    assert tma_of_lora_linear({**t, name: apart(t[name], t[name].shape[1] + 1)}) == expected
    elsewhere = torch.empty(t[name].numel() + 1, dtype=BF16)[1:].view(t[name].shape)
    assert tma_of_lora_linear({**t, name: elsewhere}) == expected


@pytest.mark.parametrize("watched", [nullcontext, torch.no_grad, torch.inference_mode, record_memory])
@pytest.mark.parametrize("shape", [(K - 3,), (M, K - 3), (2, M // 2, K - 3)])
def test_rows_that_are_no_matrix_begin_where_they_do(shape: tuple[int, ...], watched: Callable[[], Any]) -> None:
    """A view of them is no copy, which would begin at a multiple of 16 bytes, however the op is called."""
    width, generator = shape[-1], torch.Generator().manual_seed(0)
    t = lora_tensors(M, width, N, R, BF16)
    x = torch.randn(prod(shape) + 1, generator=generator).to(BF16)[1:].view(shape)
    with watched():
        y = lk.lora_linear(x, t["weight"], t["lora_a"], t["lora_b"], backend="triton")
        expected = lk.lora_linear(x.clone(), t["weight"], t["lora_a"], t["lora_b"], backend="triton")
    torch.testing.assert_close(y, expected)


def lies_apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, but for x, W and A as ``operands`` has them."""
    moved = {name: apart(tensors[name].detach(), 72) for name in ("x", "weight", "lora_a")}
    return {**tensors, **{name: t.requires_grad_(tensors[name].requires_grad) for name, t in moved.items()}}


@pytest.mark.parametrize("factor_dtype", [BF16, F64])
@pytest.mark.parametrize("family", ["lora", "dora", "dora with dropout of the base"])
def test_copies_of_rows_that_lie_apart_are_planned_as_they_are(family: str, factor_dtype: torch.dtype) -> None:
    """What kernels get of float64 factors, and drop(x), have other rows than the operands themselves."""
    if family == "lora":
        problem = lora_problem(family, lies_apart(lora_tensors(M, K, N, R, BF16, factor_dtype)))
    else:
        tensors = lies_apart(dora_tensors(M, K, N, R, dtype=BF16, factor_dtype=factor_dtype))
        dropout = {"dropout_p": 0.2, "dropout_base": True} if family != "dora" else {}
        problem = dora_problem(family, tensors, **dropout)
    y, grads = differentiate(lambda t: problem.run(t, "triton"), leaves(problem.tensors))
    eager_y, eager = differentiate(problem.eager, leaves(problem.tensors))
    oracle_y, oracle = differentiate(lambda t: problem.run(t, "reference"), leaves(problem.tensors, F64))
    assert_as_exact_as_eager(y, eager_y, oracle_y, what="y")
    for name, grad in grads.items():
        assert_as_exact_as_eager(grad, eager[name], oracle[name], factor=GRADIENT_FACTOR, what=name)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_results_lie_within_the_formulas_bound(first: int) -> None:
    """The fuzzer's calls."""
    found = [fault for seed in range(first, first + CHUNK) for fault in faults(seed, ("triton",))]
    assert not found, "\n".join(found)
