"""Frozen weights of any format: all that ops and layers may do with W, whatever it is stored as.

A weight is a plain tensor (``dense``) or a :class:`FrozenWeight`, and these functions take both:

    product(x, W, bias)     x Wᵀ + bias
    grad_product(dY, W)     dY W
    rows(W, start, stop)    rows of W as a dense matrix, for norms and blocks
    dense(W)                all of it
    corrected(x, W, ...)    x Wᵀ and the correction in one sum, and corrected_grad(dY, Q, W, ...) of dX: by the
                            extension, on a CPU

A new format is one file here, imported below (docs/adding_a_weight_format.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cpp import cpp
from . import dense as _dense
from .awq import AWQWeight
from .coded import DTYPES, CodedWeight
from .experts import ExpertWeights
from .format import FORMATS, FrozenWeight, register, unpacked
from .fp8 import FP8Weight
from .gguf import Q4_KWeight, Q8_0Weight
from .gptq import GPTQWeight
from .int4 import Int4Weight
from .int8 import Int8Weight
from .mxfp4 import MXFP4Weight
from .nf4 import FP4Weight, NF4Weight
from .nvfp4 import NVFP4Weight
from .rounding import ROUNDINGS

Weight = Tensor | FrozenWeight


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, (..., N) in x's dtype; a bias of another dtype is cast to it."""
    return _dense.product(x, weight, bias) if isinstance(weight, Tensor) else weight.product(x, bias)


def grad_product(grad_y: Tensor, weight: Weight) -> Tensor:
    """dY W, (..., K) in dY's dtype."""
    return _dense.grad_product(grad_y, weight) if isinstance(weight, Tensor) else weight.grad_product(grad_y)


def corrected(x: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, P, u) of y = column_scale ∘ u + bias, u = x Wᵀ + s (P ∘ gate) Bᵀ, P = drop(x) Aᵀ, by the extension.

    ``rest``: bias, gate, scaling, dropout_seed, dropout_p, column_scale, keep_u.
    """
    if isinstance(weight, Tensor):
        found: tuple[Tensor, Tensor, Tensor] = cpp.lora_linear_fused(x, weight, lora_a, lora_b, *rest)
    else:
        found = cpp.lora_linear_coded(x, *_coded(weight).arguments(), lora_a, lora_b, *rest)
    return found


def corrected_grad(grad_y: Tensor, q: Tensor, weight: Weight, lora_a: Tensor, *rest: Any) -> Tensor:
    """dX = (row_scale ∘ dY) W + drop'(s (Q ∘ gate) A), by the extension.

    ``rest``: gate, scaling, dropout_seed, dropout_p, row_scale.
    """
    if isinstance(weight, Tensor):
        found: Tensor = cpp.lora_grad_x(grad_y, q, weight, lora_a, *rest)
    else:
        found = cpp.lora_grad_x_coded(grad_y, q, *_coded(weight).arguments(), lora_a, *rest)
    return found


def corrected_backward(grad_y: Tensor, x: Tensor, weight: Weight, *rest: Any) -> tuple[Tensor, ...]:
    """(dX, dA, dB, Q) in one call of the extension. ``rest``: A, B, P, gate, scaling, dropout_seed, dropout_p."""
    if isinstance(weight, Tensor):
        found: tuple[Tensor, ...] = cpp.lora_backward(grad_y, x, weight, *rest)
    else:
        found = cpp.lora_backward_coded(grad_y, x, *_coded(weight).arguments(), *rest)
    return found


def _coded(weight: Weight) -> CodedWeight:
    assert isinstance(weight, CodedWeight)
    return weight


def operand(weight: Weight) -> Any:
    """The weight as Triton's launchers take it."""
    return weight.operand() if isinstance(weight, CodedWeight) else weight


def like(x: Any, weight: Weight) -> Weight:
    """The weight as x multiplies it: codes stand for values of any dtype, and are rounded to x's."""
    if isinstance(weight, CodedWeight) and isinstance(x, Tensor) and x.dtype in DTYPES:
        return weight.to(x.dtype)
    return weight


def in_dtype(weight: Weight, dtype: torch.dtype) -> Weight:
    """The weight of that dtype, as autocast casts it: a copy of a tensor, the same codes of others."""
    return weight.to(dtype) if isinstance(weight, (Tensor, CodedWeight)) else weight


def rows(weight: Weight, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of W, dense, in its dtype."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)


def dense(weight: Weight) -> Tensor:
    """W as a tensor (N, K) in its dtype: itself where it is one. Of experts (E, N, K)."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def owners(weight: Weight, rows: int) -> Tensor | None:
    """Which expert's each of the rows is, (M,) int64, where W is that of experts; else None."""
    return weight.owners(rows) if isinstance(weight, ExpertWeights) else None


def of(module: nn.Module) -> FrozenWeight | None:
    """The weight of a module that a format knows; None for any other module."""
    own = getattr(module, "stored_weight", None)  # of this package's own CodedLinear
    if own is not None:
        made: FrozenWeight = own()
        return made
    found = (format_.from_module(module) for format_ in FORMATS.values())
    return next((weight for weight in found if weight is not None), None)


def encoders() -> dict[str, Any]:
    """The formats that a dense weight can be stored in, by name: those with ``from_dense``."""
    return {name: kind for name, kind in FORMATS.items() if hasattr(kind, "from_dense")}


__all__ = [
    "DTYPES",
    "FORMATS",
    "ROUNDINGS",
    "AWQWeight",
    "CodedWeight",
    "ExpertWeights",
    "FP4Weight",
    "FP8Weight",
    "FrozenWeight",
    "GPTQWeight",
    "Int4Weight",
    "Int8Weight",
    "MXFP4Weight",
    "NF4Weight",
    "NVFP4Weight",
    "Q4_KWeight",
    "Q8_0Weight",
    "Weight",
    "corrected",
    "corrected_backward",
    "corrected_grad",
    "dense",
    "encoders",
    "grad_product",
    "like",
    "of",
    "operand",
    "owners",
    "product",
    "register",
    "rows",
    "unpacked",
]
