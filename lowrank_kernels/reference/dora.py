"""DoRA linear, as the formula says (Liu et al., arXiv 2402.09353)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lora import _accumulation_dtype, _drop, _keep, _rows


class DoRAGradients(NamedTuple):
    """Gradients of :func:`dora_linear_ref`; None where not asked for."""

    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    magnitude: Tensor | None
    bias: Tensor | None


def dora_weight_norm_ref(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float = 1.0) -> Tensor:
    """n_i = ‖W_i + s B_i A‖₂ over the dense sum.

    Args:
        weight: (N, K).  lora_a: (R, K).  lora_b: (N, R); operands are widened to float32 (float64 stays), not rounded.

    Returns:
        (N,) in float32, or float64 where an operand is.
    """
    dtype = torch.promote_types(_accumulation_dtype(weight.dtype), torch.promote_types(lora_a.dtype, lora_b.dtype))
    return (weight.to(dtype) + scaling * (lora_b.to(dtype) @ lora_a.to(dtype))).norm(dim=1)


def dora_column_scale_ref(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / n; 0 for a row whose norm is 0, NaN for one whose norm is NaN."""
    zero = norm == 0
    return torch.where(zero, 0.0, magnitude.to(norm.dtype) / torch.where(zero, 1.0, norm))


def dora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    column_scale: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    dropout_base: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = g ∘ u + bias with u = x Wᵀ + s P Bᵀ, P = drop(x) Aᵀ.

    With ``dropout_base`` (PEFT's form): y = x Wᵀ + (g - 1) ∘ (drop(x) Wᵀ) + g ∘ s P Bᵀ + bias, and
    u = drop(x) Wᵀ + s P Bᵀ, so that y = g ∘ u + (x - drop(x)) Wᵀ + bias.

    Returns:
        y (..., N), P (M, R) and u (M, N), all in x's dtype.
    """
    acc = _accumulation_dtype(x.dtype)
    x2 = _rows(x).to(acc)
    w = weight.to(acc)
    a, b = (f.to(x.dtype).to(acc) for f in (lora_a, lora_b))
    dropped = _drop(x2, _keep(x2, dropout_p, dropout_seed), dropout_p)
    p = dropped @ a.T
    u = (dropped if dropout_base else x2) @ w.T + scaling * (p @ b.T)
    y = column_scale.to(acc) * u
    if dropout_base:
        y = y + (x2 - dropped) @ w.T
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), p.to(x.dtype), u.to(x.dtype)


def dora_linear_backward_ref(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    column_scale: Tensor,
    norm: Tensor,
    p: Tensor | None,
    *,
    u: Tensor | None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    dropout_base: bool = False,
    detach_norm: bool = True,
    needs: tuple[bool, ...] = (True, True, True, True, True),
) -> DoRAGradients:
    """With dU = g ∘ dY and Q = dU B: dX = dU W + drop'(s Q A), dA = s Qᵀ drop(x), dB = s dUᵀ P, dbias = Σ_m dY,
    dm = S / n with S = Σ_m dY ∘ u (0 where n is 0).

    With ``dropout_base``: dX = dY W + drop'((dU - dY) W + s Q A) in place of the one above, which says the same as
    drop'(dU W + s Q A) + (dY W - drop'(dY W)).
    Without ``detach_norm`` the norm carries a gradient as well: with c = -g ∘ S / n², V = W + s B A,
    dB += s (c ∘ V) Aᵀ and dA += s Bᵀ (c ∘ V).

    Args:
        needs: which of (x, lora_a, lora_b, magnitude, bias) to compute.
    """
    dtype = grad_y.dtype
    acc = _accumulation_dtype(dtype)
    dy = _rows(grad_y).to(acc)
    w = weight.to(acc)
    a, b = (f.to(dtype).to(acc) for f in (lora_a, lora_b))
    g, n = column_scale.to(acc), norm.to(acc)
    need_x, need_a, need_b, need_m, need_bias = needs
    du = g * dy
    q = du @ b
    grads: list[Tensor | None] = [None] * 5
    if need_x:
        correction = scaling * (q @ a)
        base = dy @ w if dropout_base else du @ w
        if dropout_base:
            correction = correction + (du - dy) @ w
        keep = _keep(correction, dropout_p, dropout_seed)
        grad_x = base + _drop(correction, keep, dropout_p)
        grads[0] = grad_x.to(dtype).reshape(*grad_y.shape[:-1], weight.shape[1])
    grad_a = grad_b = None
    if need_a:
        assert x is not None
        x2 = _rows(x).to(acc)
        grad_a = scaling * (q.T @ _drop(x2, _keep(x2, dropout_p, dropout_seed), dropout_p))
    if need_b:
        assert p is not None
        grad_b = scaling * (du.T @ p.to(acc))
    through_norm = not detach_norm and (need_a or need_b)
    if need_m or through_norm:
        assert u is not None
        inner = (dy * u.to(acc)).sum(0)
        zero = n == 0
        if need_m:
            grads[3] = torch.where(zero, 0.0, inner / n)
        if through_norm:
            c = torch.where(zero, 0.0, -g * inner / n.square())[:, None]
            dense = c * (w + scaling * (lora_b.to(acc) @ lora_a.to(acc)))
            if grad_a is not None:
                grad_a = grad_a + scaling * (lora_b.to(acc).T @ dense)
            if grad_b is not None:
                grad_b = grad_b + scaling * (dense @ lora_a.to(acc).T)
    grads[1] = None if grad_a is None else grad_a.to(lora_a.dtype)
    grads[2] = None if grad_b is None else grad_b.to(lora_b.dtype)
    if need_bias:
        grads[4] = dy.sum(0).to(dtype)
    return DoRAGradients(*grads)
