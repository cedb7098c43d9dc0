"""VeLoRA: projections of sub-tokens in place of x, and ``lowrank_kernels::velora_linear``, which saves them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpp import cpp
from ..reference.dropout import dropout_keep_mask_ref
from ..weights import grad_product, product
from .library import define_trained
from .operands import as_rows, device_error, floats_error, like_rows_of, product_error, under_autocast, vector_error


class VeLoRALinear(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.velora_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    velora_vector: Tensor


class VeLoRALinearResults(NamedTuple):
    y: Tensor
    z: Tensor | None


class VeLoRALinearBackward(NamedTuple):
    """Arguments of the backward. ``needs``: the gradients wanted, of (x, weight, bias)."""

    grad_y: Tensor
    z: Tensor | None
    weight: Tensor
    velora_vector: Tensor
    needs: tuple[bool, ...]


class VeLoRALinearGradients(NamedTuple):
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def velora_error(op: str, x: Tensor, vector: Any) -> Exception | None:
    """The error of a vector that x (..., K) cannot be projected on; None where there is none."""
    if vector is None:
        return None
    if not isinstance(vector, Tensor) or not isinstance(x, Tensor) or x.dim() == 0:
        return TypeError(f"{op}: expected velora_vector to be a tensor or None, got {type(vector).__name__}")
    k, d = x.shape[-1], vector.numel()
    if vector.dim() != 1 or d == 0 or k % d:
        return ValueError(
            f"{op}: expected velora_vector of shape (d,), d dividing K = {k}, got {tuple(vector.shape)}; a token is "
            f"divided into K / d sub-tokens of one length"
        )
    if vector.requires_grad and torch.is_grad_enabled():
        return ValueError(f"{op}: expected velora_vector to be a constant, got one that requires grad; detach it")
    return vector_error(op, "velora_vector", "d", vector, d, x.device)


def check_velora_linear(call: VeLoRALinear) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, (x, weight, bias, vector) = "velora_linear", call
    error = floats_error(op, x=x, weight=weight, velora_vector=vector) or product_error(op, x, weight)
    error = error or device_error(op, x, weight=weight) or velora_error(op, x, vector)
    if error is None and weight.dtype != x.dtype and not under_autocast(x):
        error = TypeError(
            f"{op}: expected x and weight of one dtype, got {x.dtype} and {weight.dtype}; cast x, or run under "
            f"torch.autocast"
        )
    return error or vector_error(op, "bias", "N", bias, weight.shape[0], x.device)


def dropped(x: Tensor, dropout_p: float, seed: Tensor | None, backend: str) -> Tensor:
    """drop(x), (M, K), with the mask that the kernels draw."""
    assert seed is not None
    if backend == "triton":
        from ..kernels.dora import dropout

        return dropout(x, dropout_p, seed)
    draw = cpp.dropout_keep_mask if backend == "cpu" else dropout_keep_mask_ref
    return torch.where(draw(seed, x.shape[0], x.shape[1], dropout_p), x / (1.0 - dropout_p), 0.0)


def project(x: Tensor, vector: Tensor) -> Tensor:
    """z (M, K / d): of each sub-token of x (M, K) its product with v (d,), which is rounded to x's dtype."""
    return x.reshape(x.shape[0], x.shape[1] // vector.shape[0], vector.shape[0]) @ vector.to(x.dtype)


def reconstruct(z: Tensor, vector: Tensor) -> Tensor:
    """z ⊗ v: (M, K) of z (M, K / d)."""
    return (z[:, :, None] * vector).flatten(1)


def unit_mean(subtokens: Tensor) -> Tensor:
    """The mean of sub-tokens (n, d) to unit length, in float32 or float64: 1 / √d everywhere where it is zero; zeros
    where it is not finite, or there is none."""
    mean = subtokens.mean(0, dtype=torch.promote_types(subtokens.dtype, torch.float32))
    finite = mean.isfinite().all()
    mean = torch.where(mean.any(), mean, torch.ones_like(mean))
    mean = mean / mean.abs().max()  # squares of what is very small would be zero
    return torch.where(finite, mean / torch.linalg.vector_norm(mean), 0.0)


def _forward(call: VeLoRALinear, plan: Any) -> VeLoRALinearResults:
    rows = as_rows(call.x)
    y = like_rows_of(call.x, product(rows, call.weight, call.bias))
    return VeLoRALinearResults(y, project(rows, call.velora_vector))


def _backward(call: VeLoRALinearBackward, plan: Any) -> VeLoRALinearGradients:
    grad_y, z, weight, vector, (need_x, need_weight, need_bias) = call
    rows = as_rows(grad_y)
    grad_x = like_rows_of(grad_y, grad_product(rows, weight)) if need_x else None
    grad_weight = None
    if need_weight:
        assert z is not None
        grad_weight = reconstruct(rows.T @ z, vector.to(z.dtype))
    return VeLoRALinearGradients(grad_x, grad_weight, rows.sum(0) if need_bias else None)


def _forward_fake(call: VeLoRALinear) -> VeLoRALinearResults:
    x, d = call.x, call.velora_vector.shape[0]
    y = x.new_empty(*x.shape[:-1], call.weight.shape[0])
    return VeLoRALinearResults(y, x.new_empty(x.shape[:-1].numel(), x.shape[-1] // d))


def _backward_fake(call: VeLoRALinearBackward) -> VeLoRALinearGradients:
    grad_y, (n, k) = call.grad_y, call.weight.shape
    shapes = grad_y.new_empty(*grad_y.shape[:-1], k), grad_y.new_empty(n, k), grad_y.new_empty(n)
    return VeLoRALinearGradients(
        *(shape if need else grad_y.new_empty(0) for shape, need in zip(shapes, call.needs, strict=True))
    )


def _cast(dtype: torch.dtype, call: VeLoRALinear) -> VeLoRALinear:
    if call.x.dtype == torch.float64:
        return call
    bias = None if call.bias is None else call.bias.to(dtype)
    return call._replace(x=call.x.to(dtype), weight=call.weight.to(dtype), bias=bias)


call_velora_linear = define_trained(
    "velora_linear",
    VeLoRALinear,
    VeLoRALinearResults,
    VeLoRALinearBackward,
    VeLoRALinearGradients,
    forward=(_forward, _forward_fake),
    backwards=(_backward, _backward_fake),
    keep=lambda call, results: {"z": results.z if call.weight.requires_grad else None},
    autocast=_cast,
)
