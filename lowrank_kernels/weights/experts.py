"""The weights of a block of experts as one W: each row is multiplied by that of its own expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cpp import cpp
from . import dense
from .format import FrozenWeight, register

Multiply = Callable[[Tensor, Tensor, Tensor], None]
"""(rows, W, y): y = rows Wᵀ."""


def by_library(rows: Tensor, weight: Tensor, y: Tensor) -> None:
    if dense.library_reads_past_rows(rows.dtype, rows.device.type, rows.shape[1]):
        by_extension(rows, weight, y)
    else:
        torch.mm(rows, weight.T, out=y)


def by_extension(rows: Tensor, weight: Tensor, y: Tensor) -> None:
    y.copy_(cpp.frozen_product(rows, dense.adjacent(weight), None))


@register
class ExpertWeights(FrozenWeight):
    """W_e (N, K) of E experts, for rows of which it is known whose they are: row m has y_m = W_e(m) x_m.

    Made for one batch of rows; W itself is not copied.

    Args:
        weight: (E, N, K), of any strides: experts that are stored as (E, K, N) are its transposed view.
        bounds: (E + 1,) int32: expert e has the rows ``order[bounds[e] : bounds[e + 1]]``, and there are no others.
        order: (M,) int32; None where rows are sorted by expert.

    A GPU multiplies all experts in one call of torch's grouped product where it has one for the dtype, without
    synchronising; else the bounds are read, and each expert's rows are multiplied by themselves. Experts without rows
    cost nothing.
    """

    format = "experts"

    def __init__(self, weight: Tensor, bounds: Tensor, order: Tensor | None = None) -> None:
        self.weight, self.bounds, self.order = weight, bounds, order
        self.shape, self.dtype = weight.shape[1:], weight.dtype

    def parts(self) -> Sequence[Tensor]:
        return [self.weight, self.bounds] if self.order is None else [self.weight, self.bounds, self.order]

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor], settings: str) -> ExpertWeights:
        return cls(*parts)

    def stride(self, dim: int | None = None) -> int | tuple[int, ...]:
        strides = self.weight.stride()[1:]
        return strides if dim is None else strides[dim]

    def numel(self) -> int:
        return self.weight.numel()

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same weights, rounded to another dtype."""
        return ExpertWeights(self.weight.to(dtype), self.bounds, self.order)

    def dense(self) -> Tensor:
        """(E, N, K); :meth:`owners` tells which of them is a row's."""
        return self.weight

    def owners(self, rows: int) -> Tensor:
        """The expert of each of ``rows`` rows, int64."""
        experts = torch.arange(len(self.weight), device=self.device)
        owners = experts.repeat_interleave(self.bounds.diff().long(), output_size=rows)
        return owners if self.order is None else torch.empty_like(owners).scatter_(0, self.order.long(), owners)

    def product(self, x: Tensor, bias: Tensor | None, multiply: Multiply = by_library) -> Tensor:
        """W_e(m) x_m for each row; there is no bias."""
        assert bias is None
        return self._each(x, self.weight, multiply)

    def grad_product(self, grad_y: Tensor, multiply: Multiply = by_library) -> Tensor:
        return self._each(grad_y, self.weight.transpose(1, 2), multiply)

    def _each(self, rows: Tensor, weight: Tensor, multiply: Multiply) -> Tensor:
        if _grouped(rows, weight):
            into = None if self.order is None else self.order.long()
            given = rows if into is None else rows[into]
            y = torch.nn.functional.grouped_mm(given, weight.transpose(1, 2), offs=self.bounds[1:])
            return y if into is None else torch.empty_like(y).index_copy_(0, into, y)
        y = rows.new_empty(rows.shape[0], weight.shape[1])
        order = self.order
        first, *ends_at = self.bounds.tolist()
        for w, last in zip(weight, ends_at, strict=True):
            if first < last and order is None:
                multiply(rows[first:last], w, y[first:last])
            elif first < last and order is not None:
                own, of_own = order[first:last].long(), y.new_empty(last - first, y.shape[1])
                multiply(rows[own], w, of_own)
                y[own] = of_own
            first = last
        return y


def _grouped(rows: Tensor, weight: Tensor) -> bool:
    """True where torch has a grouped product that runs without a look at the bounds: it wants rows at multiples of 16
    bytes. (On a CPU it is a loop, too, over products that the extension can be faster than.)"""
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    inner = weight.stride(1) if weight.stride(2) == 1 else weight.stride(2)
    return rows.stride(0) % 8 == 0 and inner % 8 == 0 and weight.shape[1] % 8 == 0
