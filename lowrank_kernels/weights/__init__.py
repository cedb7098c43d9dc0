"""Frozen weights of any format: all that ops and layers may do with W, whatever it is stored as.

A weight is a plain tensor (``dense``) or a :class:`FrozenWeight`, and these functions take both:

    product(x, W, bias)     x Wᵀ + bias
    grad_product(dY, W)     dY W
    rows(W, start, stop)    rows of W as a dense matrix, for norms and blocks
    dense(W)                all of it

A new format is one file here, imported below (docs/adding_a_weight_format.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from . import dense as _dense
from .format import FORMATS, FrozenWeight, register, unpacked

Weight = Tensor | FrozenWeight


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, (..., N) in x's dtype; a bias of another dtype is cast to it."""
    return _dense.product(x, weight, bias) if isinstance(weight, Tensor) else weight.product(x, bias)


def grad_product(grad_y: Tensor, weight: Weight) -> Tensor:
    """dY W, (..., K) in dY's dtype."""
    return _dense.grad_product(grad_y, weight) if isinstance(weight, Tensor) else weight.grad_product(grad_y)


def rows(weight: Weight, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of W, dense, in its dtype."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)


def dense(weight: Weight) -> Tensor:
    """W as a tensor (N, K) in its dtype: itself where it is one."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def packed(module: nn.Module) -> FrozenWeight | None:
    """The weight of a module that a format knows; None for any other module."""
    found = (format_.from_module(module) for format_ in FORMATS.values())
    return next((weight for weight in found if weight is not None), None)


__all__ = [
    "FORMATS",
    "FrozenWeight",
    "Weight",
    "dense",
    "grad_product",
    "packed",
    "product",
    "register",
    "rows",
    "unpacked",
]
