"""Operands as kernels take them, and checks that all op families share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..weights import FrozenWeight
from .backend import BACKENDS

_FLOAT32 = torch.finfo(torch.float32)
_LEAST_FLOAT32 = 2.0**-149  # the smallest one above 0


def as_rows(x: Tensor) -> Tensor:
    """x (..., C) as (M, C), whatever sizes are 0."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def like_rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """``rows`` (M, C), that an op has made, as (..., C) with x's leading dimensions.

    No view for autograd, which would forbid to change an op's result in place.
    """
    if x.dim() == 2 and not rows._is_view():
        return rows
    made: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[1]])
    return made


def under_autocast(x: Tensor) -> bool:
    """True where autocast is on for x's device; there is none of the meta device, and torch raises when asked."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def unit_columns(matrix: Tensor) -> Tensor:
    """The matrix itself where neighbours of a row are adjacent, else a copy whose are."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def factor(matrix: Tensor) -> Tensor:
    """A factor with adjacent columns in a dtype that kernels read: float64 becomes float32."""
    return unit_columns(matrix.float() if matrix.dtype == torch.float64 else matrix)


def vector(values: Tensor | None) -> Tensor | None:
    """Adjacent values (bias, gate, magnitude, ...) in a dtype that kernels read: float64 becomes float32."""
    if values is None:
        return None
    return (values.float() if values.dtype == torch.float64 else values).contiguous()


def float32_vector(values: Tensor | None) -> Tensor | None:
    """The same of what kernels read as float32: norms, scales, weights."""
    return None if values is None else values.to(torch.float32).contiguous()


def flag_error(op: str, name: str, value: Any) -> Exception | None:
    return (
        None if isinstance(value, bool) else TypeError(f"{op}: expected {name} to be True or False, got {value!r:.60}")
    )


def check_flag(op: str, name: str, value: Any) -> None:
    raise_error(flag_error(op, name, value))


def seed_tensor(op: str, name: str, seed: Any, device: torch.device) -> Tensor:
    """A seed as an int64 scalar on ``device``; drawn from torch's generator when none is given."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"{op}: expected {name} to be an int or an int64 scalar tensor, got {seed!r:.60}")
    return seed.reshape(()).to(device)


def count_error(op: str, name: str, value: Any, least: int) -> Exception | None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        return ValueError(f"{op}: expected {name} to be an integer of {least} or more, got {value!r:.60}")
    return None


def scaling_error(op: str, scaling: Any, dtype: torch.dtype) -> Exception | None:
    """The error of a scaling that is no finite number, or that float32, in which kernels apply it, turns into 0 or
    infinity."""
    if type(scaling) is float or (isinstance(scaling, (int, float)) and not isinstance(scaling, bool)):
        size = abs(scaling)
        if size == 0.0 or _LEAST_FLOAT32 <= size <= _FLOAT32.max:
            return None
        if dtype == torch.float64 and math.isfinite(scaling):
            return None
        return ValueError(f"{op}: expected scaling to be a finite number that float32 can hold, got {scaling!r}")
    return TypeError(f"{op}: expected scaling to be a number, got {type(scaling).__name__}")


def raise_error(error: Exception | None) -> None:
    if error is not None:
        raise error


def vector_error(
    op: str, name: str, letter: str, values: Any, size: int, device: torch.device, *, like: str = "x"
) -> Exception | None:
    """The error of what is neither None nor floats of shape (size,) on the device."""
    if values is None:
        return None
    if not isinstance(values, Tensor):
        return TypeError(f"{op}: expected {name} to be a tensor or None, got {type(values).__name__}")
    if values.shape != (size,):
        return ValueError(f"{op}: expected {name} of shape ({letter},) = ({size},), got {tuple(values.shape)}")
    if values.device != device:
        return ValueError(f"{op}: expected {name} on {device} like {like}, got {values.device}")
    if not values.is_floating_point():
        return TypeError(f"{op}: expected {name} of a floating dtype, got {values.dtype}")
    return None


def floats_error(op: str, **tensors: Any) -> Exception | None:
    """The error of the first argument that is no tensor of floats."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, (Tensor, FrozenWeight)):
            return TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            return TypeError(f"{op}: expected {name} of a floating dtype, got {tensor.dtype}")
    return None


def device_error(op: str, x: Tensor, **others: Tensor | FrozenWeight | None) -> Exception | None:
    """The error of the first argument that is on another device than x."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            return ValueError(f"{op}: expected {name} on {x.device} like x, got {other.device}")
    return None


def product_error(op: str, x: Tensor, weight: Tensor | FrozenWeight) -> Exception | None:
    """The error of shapes of x (..., K) and W (N, K) that do not fit together."""
    if weight.dim() != 2:
        return ValueError(f"{op}: expected weight of shape (N, K), got {tuple(weight.shape)}")
    k = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != k:
        return ValueError(f"{op}: expected x of shape (..., K) = (..., {k}), got {tuple(x.shape)}")
    return None


def frozen_error(
    op: str, x: Tensor, weight: Tensor | FrozenWeight, cure: str = "or train it with torch.nn.functional.linear"
) -> Exception | None:
    """The error of a W that has another dtype than x outside of autocast, or that trains."""
    if weight.dtype != x.dtype and not under_autocast(x):
        return TypeError(
            f"{op}: expected x and weight of one dtype, got {x.dtype} and {weight.dtype}; "
            f"cast x, or run under torch.autocast"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        return ValueError(
            f"{op}: expected a frozen weight, got one that requires grad; "
            f"call weight.requires_grad_(False){cure if cure.startswith(':') else ', ' + cure}"
        )
    return None


def number_error(op: str, name: str, value: Any, least: float, below: float = math.inf) -> Exception | None:
    """The error of what is no number with least <= value < below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    if not least <= value < below:
        limit = f"{least:g} <= {name}" + (f" < {below:g}" if below < math.inf else ", finite")
        return ValueError(f"{op}: expected {limit}, got {value}")
    return None


def backend_error(op: str, backend: Any) -> Exception | None:
    if backend not in BACKENDS:
        return ValueError(f"{op}: expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")
    return None
