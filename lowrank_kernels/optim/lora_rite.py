"""LoRA-RITE: a step on B A that does not depend on how B A is factored (Yen et al., arXiv 2410.20625)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .factors import Bucket, FactorOptimizer, Grams, damped
from .settings import check_betas, check_number

_ROOT_ROUNDS = 28


def inverse_root(matrix: Tensor, eps: float) -> Tensor:
    """V (V + δ I)^(-3/2) for symmetric V ≥ 0 (…, R, R), δ = eps · mean eigenvalue; zero for V = 0.

    V^(-1/2) where V is above δ; directions below it, which hold rounding errors alone, are left out instead of being
    scaled up. Coupled Newton-Schulz on V + δ over its trace: products alone, which need no synchronisation. An
    eigenvalue grows by 9/4 a round, so 28 rounds bring in all down to 1e-9 of the trace. Small ones lose digits to the
    large ones in float32: give it float64.
    """
    v = damped(matrix, eps)
    trace = v.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    y, z = v / trace, eye.expand_as(v)
    for _ in range(_ROOT_ROUNDS):
        t = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return (matrix / trace) @ z @ z @ z / trace.sqrt()


def polar_basis(factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(U, R⁻¹) with U R = F, a tall factor (…, rows, R), and RᵀR = FᵀF + δ I, δ = eps · mean eigenvalue of FᵀF.

    From the QR of F above √δ I: U has orthonormal columns as far as F has full rank, and next to nothing in directions
    that F does not have; R⁻¹ is at most 1/√δ there.
    """
    r = factor.shape[-1]
    delta = (eps / r * factor.square().sum((-2, -1))).clamp_min(1e-30)
    eye = torch.eye(r, dtype=factor.dtype, device=factor.device).expand(*factor.shape[:-2], r, r)
    q, triangle = torch.linalg.qr(torch.cat([factor, delta.sqrt()[..., None, None] * eye], dim=-2))
    return q[..., :-r, :], torch.linalg.solve_triangular(triangle, eye, upper=True)


class LoRARITE(FactorOptimizer):
    """Adam in coordinates that do not change when (B, A) is replaced by (B C, C⁻¹ A).

    For L = Aᵀ beside Rt = B = U R (and alike for B beside Aᵀ):
    ḡ = ∇_L R⁻¹;  p = U(t)ᵀ U(t-1);  V ← β₂ p V pᵀ + (1 - β₂) ḡᵀḡ / rows;  u = ḡ V^(-1/2);
    M ← β₁ M pᵀ + (1 - β₁) u;  L ← L - lr · M UᵀU (R⁻¹)ᵀ. V and M are corrected for their zero start as Adam's are.

    UᵀU = I, but where a factor has a lower rank. Directions that the gradient or the other factor does not have are
    left out, and the longer of the two steps is cut where both together would move B A by more than each alone does
    (:func:`~lowrank_kernels.optim.factors.within_first_order`): a step has the length that the rate says for every
    rank, number of gradient rows and start.

    Args:
        groups: of ``factor_groups(model)``.
        lr: learning rate: a step moves an element of W by about lr · s √(R/N + R/K), in root mean square.
        betas: β₁, β₂.
        eps: damping of V, over its mean eigenvalue; at least a few units of rounding. That of BᵀB and AAᵀ is one unit
            of rounding of the factors' dtype.
        adam_eps: of parameters that are no factors, which get AdamW's step.
        weight_decay: decoupled.

    State of a layer: 2 (K + N) R + 2 R² floats, as Adam's but for R². The mass that p takes out of V where U turns
    away is not put back (the paper's option).

    Raises:
        TypeError, ValueError: as :class:`FactorOptimizer`.

    Source: Yen et al., arXiv 2410.20625, algorithm 1.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("adam_eps", adam_eps), ("weight_decay", weight_decay)):
            check_number("LoRARITE", name, value)
        check_betas("LoRARITE", betas)
        defaults = {"lr": lr, "betas": betas, "eps": adam_eps, "damping": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults)

    def step_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        a, b, grad_a, grad_b = bucket.factors()
        step, (beta1, beta2), r = bucket.next_step(), group["betas"], a.shape[-2]
        # Side 0 is L = Aᵀ, stepped in the basis of B; side 1 is B, stepped in the basis of Aᵀ.
        bases = [polar_basis(factor, bucket.rounding) for factor in (b, a.mT)]
        gradients = [g @ inverse for g, (_, inverse) in zip((grad_a.mT, grad_b), bases, strict=True)]
        transports, seconds = [], []
        for side, ((u, _), gradient) in enumerate(zip(bases, gradients, strict=True)):
            basis = bucket.state(side, "basis", tuple(u.shape[1:]))
            second = bucket.state(side, "second_moment", (r, r))
            transport = u.mT @ basis
            turned = transport @ second @ transport.mT
            second.copy_(torch.lerp(gradient.mT @ gradient / gradient.shape[-2], turned, beta2))
            basis.copy_(u)
            transports.append(transport)
            seconds.append(second / (1 - beta2**step))
        eps = max(group["damping"], bucket.rounding, 8 * r * torch.finfo(bucket.dtype).eps)
        roots = inverse_root(torch.cat(seconds).double(), eps).to(bucket.dtype).chunk(2)
        updates = []
        for side, (gradient, transport, root) in enumerate(zip(gradients, transports, roots, strict=True)):
            mean = bucket.state(side, "exp_avg", tuple(gradient.shape[1:]))
            mean.copy_(torch.baddbmm(mean @ transport.mT, gradient, root, beta=beta1, alpha=1 - beta1))
            u, inverse = bases[side]
            updates.append(mean @ (u.mT @ u @ inverse.mT / (1 - beta1**step)))
        bucket.apply(Grams.of(a, b), updates[0].mT, updates[1], group["lr"], group["weight_decay"])
