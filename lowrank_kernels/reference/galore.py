"""One step of GaLore (arXiv 2403.03507), as the formula says: Adam on a gradient projected to R rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def galore_adam_ref(
    weight: Tensor,
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
) -> None:
    """One step on W, in place.

    L = Pᵀ G, m ← β₁ m + (1 - β₁) L, v ← β₂ v + (1 - β₂) L²,
    W ← (1 - lr λ) W - lr α P (m̂ / (√v̂ + ε)), m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ).

    Args:
        weight, grad: W, G (N, K).  basis: P (N, R).  exp_avg, exp_avg_sq: m, v (R, K), float32 (float64 over float64).
        step: t, from 1.  scale: α.

    In float32 (float64 for a float64 W); W is rounded once. With G projected on its other side, give Wᵀ and Gᵀ.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    p = basis.to(wide)
    low = p.T @ grad.to(wide)
    exp_avg.mul_(betas[0]).add_(low, alpha=1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(low, low, value=1.0 - betas[1])
    direction = exp_avg / (exp_avg_sq.sqrt() / math.sqrt(1.0 - betas[1] ** step) + eps)
    rate = lr * scale / (1.0 - betas[0] ** step)
    weight.copy_((1.0 - lr * weight_decay) * weight.to(wide) - rate * (p @ direction))


@torch.no_grad()
def rotate_moments_ref(exp_avg: Tensor, exp_avg_sq: Tensor, old: Tensor, new: Tensor) -> None:
    """m ← C m, v ← (C ∘ C) v with C = P_newᵀ P_old (R, R): moments in another basis. In place.

    The first is exact: C m holds the new basis's coordinates of the part of P_old m that lies in its span. The second
    is what that makes of variances of coordinates that are not correlated.

    Args:
        exp_avg, exp_avg_sq: m, v (R, K).  old, new: P_old, P_new (N, R), orthonormal columns.
    """
    turn = new.to(exp_avg.dtype).T @ old.to(exp_avg.dtype)
    exp_avg.copy_(turn @ exp_avg)
    exp_avg_sq.copy_(turn.square() @ exp_avg_sq)
