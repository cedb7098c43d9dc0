"""Fed-RAC-LoRA: clients that share a random factor average the other, exactly (arXiv 2410.08305, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..merge import merge_lora_


@torch.no_grad()
def fed_rac_lora_(
    weight: Tensor, shared: Tensor, trained: Sequence[Tensor], *, scaling: float = 1.0,
    client_weights: Sequence[float] | None = None, sampled: str = "a", **merging: Any,
) -> Tensor:  # fmt: skip
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
        weight. The average is taken in float32 (float64 for float64 factors).

    Raises:
        ValueError: no client, weights that are negative, all zero or of another number, factors of different shapes,
            and as :func:`lowrank_kernels.merge_lora_`. W is then untouched.
    """
    if sampled not in ("a", "b"):
        raise ValueError(f"fed_rac_lora_: expected sampled to be 'a' or 'b', got {sampled!r}")
    shares = [1.0] * len(trained) if client_weights is None else [float(c) for c in client_weights]
    if not trained or len(shares) != len(trained):
        raise ValueError(
            f"fed_rac_lora_: expected one factor and one weight a client, got {len(trained)} and {len(shares)}"
        )
    if not sum(shares) > 0.0 or min(shares) < 0.0:
        raise ValueError(f"fed_rac_lora_: expected client_weights of at least 0, not all zero, got {shares}")
    if any(factor.shape != trained[0].shape for factor in trained):
        raise ValueError(
            f"fed_rac_lora_: expected trained factors of one shape, got {[tuple(factor.shape) for factor in trained]}"
        )
    mean = torch.zeros_like(trained[0], dtype=torch.promote_types(trained[0].dtype, torch.float32))
    for share, factor in zip(shares, trained, strict=True):
        mean.add_(factor, alpha=share / sum(shares))
    factors = (shared, mean) if sampled == "a" else (mean, shared)
    return merge_lora_(weight, *factors, scaling=scaling, **merging)
