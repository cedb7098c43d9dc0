"""Starting points that look at nothing but the factors: one is sampled, the other is zero, so B A is zero."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _kaiming_(factor: Tensor, r: int) -> None:
    torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def _gaussian_(factor: Tensor, r: int) -> None:
    factor.normal_(std=1 / r)


def _orthonormal_(factor: Tensor, r: int) -> None:
    side = factor.numel() // r
    if r > side:
        raise ValueError(
            f"init_factors_: expected a rank of at most {side}, the other side of the sampled factor, for "
            f"orthonormal directions, got {r}; use init='kaiming'"
        )
    q, triangle = torch.linalg.qr(torch.randn(side, r, dtype=torch.float32, device=factor.device))
    # QR alone prefers some signs; with the triangle's diagonal made positive, q is uniform over the frames.
    q = q * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    factor.copy_(q.T if factor.shape[0] == r else q)


def _zero_(factor: Tensor, r: int) -> None:
    factor.zero_()


INITS: dict[str, Callable[[Tensor, int], None]] = {
    "kaiming": _kaiming_,
    "gaussian": _gaussian_,
    "orthonormal": _orthonormal_,
    "zero": _zero_,
}


@torch.no_grad()
def init_factors_(lora_a: Tensor, lora_b: Tensor, init: str = "kaiming", *, sampled: str = "a") -> None:
    """Sample one factor and set the other to zero: B A = 0.

    - ``kaiming``: uniform on ±1/sqrt(columns) of the sampled factor: PEFT's default.
    - ``gaussian``: normal, mean 0, standard deviation 1/R: PEFT's ``init_lora_weights="gaussian"``.
    - ``orthonormal``: A Aᵀ = I, or BᵀB = I where B is sampled; uniform over such frames.
    - ``zero``: both zero. Nothing trains from there: for factors that are filled afterwards.

    Args:
        lora_a: A (R, K) and
        lora_b: B (N, R), any float dtype; written in place.
        init: one of the names above.
        sampled: "a" or "b". The one that is not sampled starts at zero and must be trained.

    Draws from torch's default generator of the factors' device.

    Raises:
        TypeError: factors that are not matrices of floats.
        ValueError: factors of different ranks; an unknown name; ``orthonormal`` with R larger than the sampled factor's
            other side.

    Source: Hu et al., arXiv 2106.09685, section 4.1; sampled B: Malinovsky et al., arXiv 2410.08305.
    """
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(factor, Tensor) or factor.dim() != 2 or not factor.is_floating_point():
            raise TypeError(f"init_factors_: expected {name} to be a matrix of floats")
    if lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"init_factors_: expected lora_a (R, K) and lora_b (N, R) of one rank, got {tuple(lora_a.shape)} and "
            f"{tuple(lora_b.shape)}"
        )
    if not isinstance(init, str) or init not in INITS:
        raise ValueError(f"init_factors_: expected init to be one of {', '.join(INITS)}, got {init!r}")
    if sampled not in ("a", "b"):
        raise ValueError(f"init_factors_: expected sampled to be 'a' or 'b', got {sampled!r}")
    factor, zeroed = (lora_a, lora_b) if sampled == "a" else (lora_b, lora_a)
    INITS[init](factor, lora_a.shape[0])
    zeroed.zero_()
