"""Linears that share their input, and MLPs of them, as the formulas say; differentiable by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu


@dataclass(frozen=True)
class Activation:
    """f, and dL/dz = gradient(dL/df, z)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _gelu_tanh(z: Tensor) -> Tensor:
    return gelu(z, approximate="tanh")


def _gelu_tanh_gradient(grad: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, z, approximate="tanh")


def _relu_squared(z: Tensor) -> Tensor:
    return relu(z).square()


def _relu_squared_gradient(grad: Tensor, z: Tensor) -> Tensor:
    return grad * (2 * relu(z))


ACTIVATIONS = {
    "silu": Activation(silu, torch.ops.aten.silu_backward),
    "gelu": Activation(gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_gradient),
    "relu_squared": Activation(_relu_squared, _relu_squared_gradient),
}
"""By name: SwiGLU's, GeGLU's (exact, and by tanh), and ReLU²."""


def mlp_hidden_ref(activation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """h = f(gate) ∘ up, or f(gate) without an up: what the down projection takes."""
    value = ACTIVATIONS[activation].value(gate)
    return value if up is None else value * up
