"""Products with a dense frozen weight by PyTorch, and by the extension where PyTorch's would be wrong."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..cpp import cpp


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias by PyTorch, which takes no bias of another dtype than x."""
    if library_reads_past_rows(x.dtype, x.device.type, weight.shape[1]):
        rows = adjacent(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
        return _as(x, cpp.frozen_product(rows, adjacent(weight), None if bias is None else _readable(bias)))
    return linear(x, weight, bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype))


def grad_product(grad_y: Tensor, weight: Tensor) -> Tensor:
    """dY W by PyTorch."""
    if library_reads_past_rows(grad_y.dtype, grad_y.device.type, weight.shape[0]):
        return product(grad_y, weight.T.contiguous(), None)
    return grad_y @ weight


def library_reads_past_rows(dtype: torch.dtype, device_type: str, inner: int) -> bool:
    """True where oneDNN reads an element beyond each row and multiplies it by zero: NaN, if that is no number.

    It does so in bfloat16 with an odd inner size on processors with AMX (torch 2.14.1).
    """
    return inner % 2 == 1 and dtype == torch.bfloat16 and device_type == "cpu" and _has_amx()


@cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def adjacent(matrix: Tensor) -> Tensor:
    """The matrix itself where its columns are adjacent, else a copy whose columns are."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _readable(bias: Tensor) -> Tensor:
    return (bias.float() if bias.dtype == torch.float64 else bias).contiguous()


def _as(x: Tensor, rows: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[1]])
    return made
