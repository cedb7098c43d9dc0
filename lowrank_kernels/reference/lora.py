"""LoRA linear, as the formula says (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import dropout_keep_mask_ref


class LoRAGradients(NamedTuple):
    """Gradients of :func:`lora_linear_ref`; None where not asked for."""

    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    gate: Tensor | None


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _keep(x: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    assert dropout_seed is not None
    return dropout_keep_mask_ref(dropout_seed.to(x.device), x.shape[0], x.shape[1], dropout_p)


def _drop(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0) / (1.0 - dropout_p)


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + bias + s (P ∘ gate) Bᵀ with P = drop(x) Aᵀ.

    Half-precision operands are widened to float32, and y is rounded once; float64 stays float64.
    Factors are first rounded to x's dtype, as every kernel does.

    Args:
        x: (..., K).  weight: (N, K).  lora_a: (R, K).  lora_b: (N, R).  bias: (N,).  gate: (R,).
        dropout_seed: int64 scalar tensor, needed when ``dropout_p`` > 0.

    Returns:
        y of shape (..., N) in x's dtype, and P of shape (M, R) in x's dtype, M being the flattened rows of x.
    """
    acc = _accumulation_dtype(x.dtype)
    x2 = _rows(x).to(acc)
    a, b = (f.to(x.dtype).to(acc) for f in (lora_a, lora_b))
    p = _drop(x2, _keep(x2, dropout_p, dropout_seed), dropout_p) @ a.T
    gated = p if gate is None else p * gate.to(acc)
    y = x2 @ weight.to(acc).T + scaling * (gated @ b.T)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), p.to(x.dtype)


def lora_linear_backward_ref(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    p: Tensor | None,
    *,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    needs: tuple[bool, ...] = (True, True, True, True, True),
) -> LoRAGradients:
    """With Q = dY B: dX = dY W + drop'(s (Q ∘ gate) A), dA = s (Q ∘ gate)ᵀ drop(x), dB = s dYᵀ (P ∘ gate),
    dbias = Σ_m dY, dgate = s Σ_m Q ∘ P.

    Args:
        grad_y: (..., N).  x: (..., K), needed for dA alone.  p: (M, R), needed for dB and dgate.
        needs: which of (x, lora_a, lora_b, bias, gate) to compute.

    Returns:
        Each gradient in its operand's dtype (bias: grad_y's), None where not needed.
    """
    dtype = grad_y.dtype
    acc = _accumulation_dtype(dtype)
    dy = _rows(grad_y).to(acc)
    a, b = (f.to(dtype).to(acc) for f in (lora_a, lora_b))
    need_x, need_a, need_b, need_bias, need_gate = needs
    q = dy @ b
    gated_q = q if gate is None else q * gate.to(acc)
    grads: list[Tensor | None] = [None] * 5
    if need_x:
        correction = gated_q @ a
        keep = _keep(correction, dropout_p, dropout_seed)
        grad_x = dy @ weight.to(acc) + scaling * _drop(correction, keep, dropout_p)
        grads[0] = grad_x.to(dtype).reshape(*grad_y.shape[:-1], weight.shape[1])
    if need_a:
        assert x is not None
        x2 = _rows(x).to(acc)
        dropped = _drop(x2, _keep(x2, dropout_p, dropout_seed), dropout_p)
        grads[1] = (scaling * (gated_q.T @ dropped)).to(lora_a.dtype)
    if need_b:
        assert p is not None
        gated_p = p.to(acc) if gate is None else p.to(acc) * gate.to(acc)
        grads[2] = (scaling * (dy.T @ gated_p)).to(lora_b.dtype)
    if need_bias:
        grads[3] = dy.sum(0).to(dtype)
    if need_gate and gate is not None:
        assert p is not None
        grads[4] = (scaling * (q * p.to(acc)).sum(0)).to(gate.dtype)
    return LoRAGradients(*grads)
