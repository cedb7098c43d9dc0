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
    _check("merge_lora_", weight, lora_a, lora_b)
    one = weight.new_ones(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))
    return _update_rows_(weight, one, lora_a, lora_b, scaling, one)


@torch.no_grad()
def merge_dora_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, column_scale: Tensor, *, scaling: float = 1.0
) -> Tensor:
    """W ← g ∘ (W + s B A), computed in float32 and rounded once to W's dtype. In place.

    Args:
        column_scale: g (N,), a factor for each row of W, which is a column of y.
        (the others, and the errors, as for :func:`merge_lora_`)

    Returns:
        weight.
    """
    _check("merge_dora_", weight, lora_a, lora_b)
    return _update_rows_(weight, torch.ones_like(column_scale), lora_a, lora_b, scaling, column_scale)


@torch.no_grad()
def unmerge_dora_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, column_scale: Tensor, *, scaling: float = 1.0
) -> Tensor:
    """W ← W / g - s B A: takes out what :func:`merge_dora_` put in, to within one rounding. In place.

    Rows with g = 0 hold nothing of what they were: the caller keeps those.
    """
    _check("unmerge_dora_", weight, lora_a, lora_b)
    return _update_rows_(weight, 1.0 / column_scale, lora_a, lora_b, -scaling, torch.ones_like(column_scale))


def _check(op: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    n, k = weight.shape
    r = lora_a.shape[0]
    if lora_a.shape != (r, k):
        raise ValueError(f"{op}: expected lora_a of shape (R, K) = ({r}, {k}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (n, r):
        raise ValueError(f"{op}: expected lora_b of shape (N, R) = ({n}, {r}), got {tuple(lora_b.shape)}")
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"{op}: expected finite factors, and {name} holds NaN or Inf")


def _update_rows_(
    weight: Tensor, before: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, after: Tensor
) -> Tensor:
    """W ← after ∘ (before ∘ W + s B A), block by block of rows."""
    accumulator = torch.promote_types(weight.dtype, torch.float32)
    a, b, before, after = (t.to(weight.device, accumulator) for t in (lora_a, lora_b, before, after))
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    blocks = zip(weight.split(rows), b.split(rows), before.split(rows), after.split(rows), strict=True)
    with torch.autocast(weight.device.type, enabled=False):
        for w, b_rows, first, last in blocks:
            w.copy_(torch.addmm(w.to(accumulator).mul_(first[:, None]), b_rows, a, alpha=scaling).mul_(last[:, None]))
    return weight
