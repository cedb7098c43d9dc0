"""Fed-RAC-LoRA: clients that share a random factor average the other, exactly (arXiv 2410.08305, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..merge import merge_lora_
from .factors import check_scaling, check_shares


@torch.no_grad()
def fed_rac_lora_(
    weight: Tensor,
    shared: Tensor,
    trained: Sequence[Tensor],
    *,
    scaling: float = 1.0,
    client_weights: Sequence[float] | None = None,
    sampled: str = "a",
    **merging: Any,
) -> Tensor:
    """End a round: W ← W + s (Σ_i c_i B_i) A, in place, which is Σ_i c_i (W + s B_i A): the factor A was shared.

    Args:
        weight: the server's W (N, K).
        shared: the round's sample, the same for all clients: A (R, K), or B (N, R) with ``sampled="b"``.
        trained: the clients' other factors, each started from zero.
        scaling: s.
        client_weights: c_i, as shares of their sum; equal ones by default.
        sampled: "a" or "b".
        merging: ``rounding`` and the like, for :func:`lowrank_kernels.merge_lora_`.

    Returns:
        weight. The average is summed in float64, and rounded once to float32 (unless a factor is of float64).

    Raises:
        TypeError: ``trained`` is no list of tensors.
        ValueError: no client, weights that are negative, not finite, all zero or of another number, an s that is not
            finite, factors of different shapes or devices, and as :func:`lowrank_kernels.merge_lora_`. W is then
            untouched.
    """
    if sampled not in ("a", "b"):
        raise ValueError(f"fed_rac_lora_: expected sampled to be 'a' or 'b', got {sampled!r}")
    check_scaling("fed_rac_lora_", scaling)
    if not isinstance(trained, (list, tuple)) or not all(isinstance(factor, Tensor) for factor in trained):
        raise TypeError("fed_rac_lora_: expected trained to be a list of tensors, one a client")
    shares = check_shares("fed_rac_lora_", len(trained), client_weights)
    first = trained[0]
    if any(factor.shape != first.shape for factor in trained):
        raise ValueError(
            f"fed_rac_lora_: expected trained factors of one shape, got {[tuple(factor.shape) for factor in trained]}"
        )
    for factor in trained:
        if factor.device != first.device or not factor.is_floating_point():
            raise ValueError(
                f"fed_rac_lora_: expected trained factors of floats on one device, got {factor.dtype} on "
                f"{factor.device}"
            )
    mean = torch.zeros_like(first, dtype=torch.float64)
    for share, factor in zip(shares, trained, strict=True):
        mean.add_(factor, alpha=share)
    if not any(factor.dtype == torch.float64 for factor in trained):
        mean = mean.float()
    factors = (shared, mean) if sampled == "a" else (mean, shared)
    return merge_lora_(weight, *factors, scaling=scaling, **merging)
