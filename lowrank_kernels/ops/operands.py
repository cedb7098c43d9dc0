"""Operands as kernels take them, and checks that all op families share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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


def is_empty(*tensors: Tensor) -> bool:
    """True where a tensor has no element: such products are left to PyTorch."""
    return any(t.numel() == 0 for t in tensors)


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: expected {name} to be True or False, got {value!r:.60}")


def check_number(op: str, name: str, value: Any, least: float, below: float = math.inf) -> None:
    """Raise for what is no number with least <= value < below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    if not least <= value < below:
        limit = f"{least:g} <= {name}" + (f" < {below:g}" if below < math.inf else ", finite")
        raise ValueError(f"{op}: expected {limit}, got {value}")


def seed_tensor(op: str, name: str, seed: Any, device: torch.device) -> Tensor:
    """A seed as an int64 scalar on ``device``; drawn from torch's generator when none is given."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"{op}: expected {name} to be an int or an int64 scalar tensor, got {seed!r:.60}")
    return seed.reshape(()).to(device)


def check_count(op: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{op}: expected {name} to be an integer of {least} or more, got {value!r:.60}")


def check_scaling(op: str, scaling: Any, dtype: torch.dtype) -> None:
    """Raise for a scaling that is no finite number, or that float32, in which kernels apply it, turns into 0 or
    infinity."""
    if type(scaling) is float or (isinstance(scaling, (int, float)) and not isinstance(scaling, bool)):
        size = abs(scaling)
        if size == 0.0 or _LEAST_FLOAT32 <= size <= _FLOAT32.max:
            return
        if dtype == torch.float64 and math.isfinite(scaling):
            return
        raise ValueError(f"{op}: expected scaling to be a finite number that float32 can hold, got {scaling!r}")
    raise TypeError(f"{op}: expected scaling to be a number, got {type(scaling).__name__}")


def check_optional_vector(
    op: str, name: str, letter: str, values: Any, size: int, device: torch.device, like: str = "x"
) -> None:
    """Raise for what is neither None nor floats of shape (size,) on the device."""
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor or None, got {type(values).__name__}")
    if values.shape != (size,):
        raise ValueError(f"{op}: expected {name} of shape ({letter},) = ({size},), got {tuple(values.shape)}")
    if values.device != device:
        raise ValueError(f"{op}: expected {name} on {device} like {like}, got {values.device}")
    if not values.is_floating_point():
        raise TypeError(f"{op}: expected {name} of a floating dtype, got {values.dtype}")
