"""Merging a low-rank correction into its weight, as the formula says."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import philox_words_ref


def round_stochastically_ref(values: Tensor, seed: Tensor, first_row: int = 0) -> Tensor:
    """float32 to one of the two nearest bfloat16, up with the probability that keeps the mean.

    The 16 bits that bfloat16 has not decide: they are added to the upper 16 bits of the Philox word of
    (seed, row, column), and the sum's carry goes into the bits that stay. NaN stays NaN.

    Args:
        values: (rows, columns) float32.
        first_row: the row of ``values[0]`` in the whole matrix.
    """
    words = philox_words_ref(seed.to(values.device), values.shape[0], values.shape[1], first_row)
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    kept = ((bits + (words >> 16)) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(values.isnan(), values, kept).to(torch.bfloat16)


def merge_lora_ref(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    before: Tensor | None = None,
    after: Tensor | None = None,
    seed: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """after ∘ (before ∘ W + s B A), row by row, in float32 (float64 for a float64 W), rounded once to W's dtype.

    Args:
        weight: W (N, K).  lora_a: A (R, K).  lora_b: B (N, R); widened, never rounded.
        before, after: (N,) or None for ones.
        seed: int64 scalar tensor: rounds stochastically, to bfloat16 alone; None: to nearest even.
        first_row: the row of ``weight[0]`` in the whole matrix, which stochastic rounding depends on.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    if before is not None:
        total = before.to(wide)[:, None] * total
    total = torch.addmm(total, lora_b.to(wide), lora_a.to(wide), alpha=scaling)
    if after is not None:
        total = after.to(wide)[:, None] * total
    return total.to(weight.dtype) if seed is None else round_stochastically_ref(total, seed, first_row)
