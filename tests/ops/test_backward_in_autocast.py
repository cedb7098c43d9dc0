"""Gradients of a forward have its dtypes, wherever backward is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.functional import block_sparse_linear, dora_weight_norm

Tensors = dict[str, Tensor]
M, K, N, R = 40, 64, 48, 4


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (M, K), "a": (R, K), "b": (N, R), "m": (N,), "bias": (N,), "blocks": (2, 16, 16)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
IDS = torch.arange(M) % 2 - 1


def many(t: Tensors, dora: bool, backend: str) -> Tensor:
    factors = (t["a"].detach(), t["b"].detach(), 0.5, *([torch.ones(N)] if dora else []))
    places = lk.LoRAStack.from_factors([factors]).places
    stack = lk.LoRAStack(t["a"], t["b"].T, places, t["m"][None] if dora else None)
    return lk.multi_lora_linear(t["x"], WEIGHT, stack, IDS, t["bias"], backend=backend)


OPS: dict[str, Callable[[Tensors, str], Tensor]] = {
    "lora_linear": lambda t, backend: lk.lora_linear(t["x"], WEIGHT, t["a"], t["b"], t["bias"], backend=backend),
    "dora_linear": lambda t, backend: lk.dora_linear(
        t["x"], WEIGHT, t["a"], t["b"], t["m"], t["bias"], backend=backend
    ),
    "dora_linear, norm differentiated": lambda t, backend: lk.dora_linear(
        t["x"], WEIGHT, t["a"], t["b"], t["m"], t["bias"], detach_norm=False, backend=backend
    ),
    "dora_weight_norm": lambda t, backend: dora_weight_norm(WEIGHT, t["a"], t["b"], backend=backend),
    "block_sparse_linear": lambda t, backend: block_sparse_linear(
        t["x"], WEIGHT, t["blocks"], INDEX, t["bias"], backend=backend
    ),
    "multi_lora_linear": lambda t, backend: many(t, False, backend),
    "multi_lora_linear, DoRA": lambda t, backend: many(t, True, backend),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_backward_in_autocast_has_the_bits_of_one_outside(op: str, backend: str) -> None:
    grads: list[Tensors] = []
    for enabled in (False, True):
        leaves = {name: t.requires_grad_() for name, t in tensors().items()}
        y = OPS[op](leaves, backend)
        assert y.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        grads.append({name: t.grad for name, t in leaves.items() if t.grad is not None})
    outside, inside = grads
    assert outside and outside.keys() == inside.keys()
    for name, gradient in outside.items():
        assert torch.equal(inside[name], gradient), name
