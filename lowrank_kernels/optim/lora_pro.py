"""LoRA-Pro: factor gradients whose product moves W as full fine-tuning would (Wang et al., arXiv 2407.18242)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .factors import Bucket, FactorOptimizer, Grams, damped, damped_inverse, product_norm
from .settings import check_betas, check_number

MOMENTS = ("factors", "full")
_DOUBLINGS = 16


def solve_sylvester(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """X with S X + X T = C for symmetric positive definite S, T (…, R, R).

    With S₋ = (S + p)⁻¹(S - p) and T₋ alike, X = S₋ X T₋ + 2p (S + p)⁻¹ C (T + p)⁻¹, a series that doubling sums: 16
    rounds of products add 65,536 terms. No eigenvalues, which a GPU would have to be waited for.
    """
    eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
    p = t.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    left, right = (torch.linalg.inv_ex(m + p * eye, check_errors=False).inverse for m in (s, t))
    x = 2 * p * (left @ c @ right)
    left, right = eye - 2 * p * left, eye - 2 * p * right
    for _ in range(_DOUBLINGS):
        x = x + left @ x @ right
        left, right = left @ left, right @ right
    return x


def lora_pro_gradients(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: Tensor | float, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The (g_A, g_B) nearest to (∇_A, ∇_B) among those that bring s (B g_A + g_B A) nearest to the full gradient.

    g_A = (BᵀB)⁻¹ ∇_A / s² + X A,  g_B = (I - B(BᵀB)⁻¹Bᵀ) ∇_B (AAᵀ)⁻¹ / s² - B X,
    BᵀB X + X AAᵀ = -(BᵀB)⁻¹ ∇_A Aᵀ / s². While B = 0: g_A = ∇_A = 0 and g_B = ∇_B (AAᵀ)⁻¹ / s².

    Args:
        a, grad_a: (…, R, K).
        b, grad_b: (…, N, R); all of one float dtype, which it is computed in.
        scaling: s, broadcast over (…, 1, 1).
        eps: what is added to BᵀB and AAᵀ before they are inverted, over their mean eigenvalue.

    With G the gradient of W, s (B g_A + g_B A) = P_B G + G P_A - P_B G P_A, P the projections on B's columns and
    A's rows. Source: theorem 2.1 and 2.2 of the paper.
    """
    # The R×R algebra is float64's: float32 has no digits left for what damping keeps.
    bb, aa = damped((b.mT @ b).double(), eps), damped((a @ a.mT).double(), eps)
    bb_inverse, aa_inverse = (damped_inverse(gram, 0.0).to(a.dtype) for gram in (bb, aa))
    # A layer whose s is 0 has no gradient, and gets none.
    scaling = torch.as_tensor(scaling, dtype=a.dtype, device=a.device)
    inverse = torch.where(scaling == 0.0, 0.0, 1.0 / scaling)
    g_a = bb_inverse @ (inverse * (inverse * grad_a))
    x = solve_sylvester(bb, aa, -(g_a @ a.mT).double()).to(a.dtype)
    g_b = inverse * (inverse * grad_b) @ aa_inverse
    return g_a + x @ a, g_b - b @ (bb_inverse @ (b.mT @ g_b) + x)


class LoRAPro(FactorOptimizer):
    """SGD with momentum, or Adam, on LoRA-Pro's gradients.

    Args:
        groups: of ``factor_groups(model)``.
        lr: learning rate. With ``moments="factors"`` it is one of SGD on W, not of Adam.
        momentum: of g_A and g_B, with ``moments="factors"``.
        betas, adam_eps: of Adam, with ``moments="full"``, and of parameters that are no factors.
        eps: damping of the R×R inverses, over their mean eigenvalue; at least the factors' unit of rounding.
        weight_decay: decoupled.
        moments: "factors": momentum of the size of the factors. "full": the paper's Adam, whose two moments are of
            W's size: those of the equivalent gradient s (B g_A + g_B A); its step is brought back to the factors by
            the same formula. Costs the memory of full fine-tuning's optimizer.

    State: (K + N) R floats a layer; with ``moments="full"`` 2 N K. A layer with s = 0 stays as it is.

    Raises:
        TypeError, ValueError: an unknown ``moments``, and as :class:`FactorOptimizer`.

    Source: Wang et al., arXiv 2407.18242.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        moments: str = "factors",
    ) -> None:
        for name, value in (("lr", lr), ("adam_eps", adam_eps), ("eps", eps), ("weight_decay", weight_decay)):
            check_number("LoRAPro", name, value)
        check_number("LoRAPro", "momentum", momentum, below=1.0, wanted="of at least 0 and below 1")
        check_betas("LoRAPro", betas)
        if moments not in MOMENTS:
            raise ValueError(f"LoRAPro: expected moments to be one of {', '.join(MOMENTS)}, got {moments!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": adam_eps,
            "damping": eps,
            "weight_decay": weight_decay,
            "moments": moments,
        }
        super().__init__(groups, defaults)

    def step_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        a, b, grad_a, grad_b = bucket.factors()
        grams = Grams.of(a, b)
        eps = max(group["damping"], bucket.rounding, 8 * a.shape[-2] * torch.finfo(bucket.dtype).eps)
        gradients = lora_pro_gradients(a, b, grad_a, grad_b, bucket.scaling, eps)
        if group["moments"] == "full":
            grad_a, grad_b = self._full_adam(group, bucket, a, b, *gradients)
            updates = lora_pro_gradients(a, b, grad_a, grad_b, bucket.scaling, eps)
        else:
            updates = self._momentum(group, bucket, grams, gradients)
        bucket.apply(grams, *updates, group["lr"], group["weight_decay"])

    @staticmethod
    def _momentum(
        group: dict[str, Any], bucket: Bucket, grams: Grams, gradients: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Momentum of g_A and g_B, cut to move B A by no more than they would have moved it when they came.

        g_A grows as B gets smaller. Beside a B that has grown since, an old one would move B A by as much more.
        """
        means = [
            bucket.state(side, "momentum", tuple(g.shape[1:])).mul_(group["momentum"]).add_(g)
            for side, g in enumerate(gradients)
        ]
        new, now = Grams.of(*gradients), Grams.of(*means)
        for side, other in enumerate((grams.b, grams.a)):
            reach = bucket.state(side, "reach", (1, 1)).mul_(group["momentum"]).add_(product_norm(other, new[side]))
            length = product_norm(other, now[side])
            means[side].mul_(torch.where(length > reach, reach / length, 1.0))
        return means[0], means[1]

    @staticmethod
    def _full_adam(
        group: dict[str, Any], bucket: Bucket, a: Tensor, b: Tensor, g_a: Tensor, g_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adam's direction for W, as the factor gradients (s Bᵀ D, s D Aᵀ) that it would have; layer by layer."""
        step, (beta1, beta2) = bucket.next_step(), group["betas"]
        shape = (b.shape[-2], a.shape[-1])
        means, squares = bucket.state(0, "exp_avg", shape), bucket.state(0, "exp_avg_sq", shape)
        correct1, correct2 = 1 - beta1**step, 1 - beta2**step
        for i in range(len(means)):
            gradient = bucket.scaling[i] * (b[i] @ g_a[i] + g_b[i] @ a[i])
            mean = means[i].lerp_(gradient, 1 - beta1)
            square = squares[i].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            direction = mean / correct1[i] / ((square / correct2[i]).sqrt_() + group["eps"])
            g_a[i], g_b[i] = bucket.scaling[i] * (b[i].mT @ direction), bucket.scaling[i] * (direction @ a[i].mT)
        return g_a, g_b
