"""Adding a correction into the weight it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24  # 64 MiB of float32 at a time, whatever the weight's size


@torch.no_grad()
def merge_lora_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float = 1.0) -> Tensor:
    """W ← W + s B A, computed in float32 and rounded once to W's dtype. In place.

    Args:
        weight: W (N, K), any float dtype; written, whether or not it requires grad.
        lora_a: A (R, K) and
        lora_b: B (N, R), any float dtype, moved to W's device.
        scaling: s; its negative takes the correction out again, to within one rounding.

    Returns:
        weight.

    float64 weights accumulate in float64. Works through blocks of rows, so that the float32 copy never
    exceeds 64 MiB.

    Raises:
        ValueError: shapes that do not fit, or a factor that is not finite (W is then untouched).
    """
    n, k = weight.shape
    r = lora_a.shape[0]
    if lora_a.shape != (r, k):
        raise ValueError(f"merge_lora_: expected lora_a of shape (R, K) = ({r}, {k}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (n, r):
        raise ValueError(f"merge_lora_: expected lora_b of shape (N, R) = ({n}, {r}), got {tuple(lora_b.shape)}")
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"merge_lora_: expected finite factors, and {name} holds NaN or Inf")
    accumulator = torch.promote_types(weight.dtype, torch.float32)
    a, b = (factor.to(weight.device, accumulator) for factor in (lora_a, lora_b))
    with torch.autocast(weight.device.type, enabled=False):
        for rows, b_rows in zip(weight.split(_rows(k)), b.split(_rows(k)), strict=True):
            rows.copy_(torch.addmm(rows.to(accumulator), b_rows, a, alpha=scaling))
    return weight


def _rows(columns: int) -> int:
    return max(1, _BLOCK_ELEMENTS // max(1, columns))
