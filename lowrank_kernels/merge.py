"""Adding a correction into the weight it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from .finite import all_finite
from .ops.backend import BACKENDS
from .ops.merge import call_merge_lora_, check_merge_lora, merge_lora_directly_, merges_directly
from .ops.operands import check_flag, check_optional_vector, check_scaling, seed_tensor

ROUNDINGS = ("nearest", "stochastic")


def merge_lora_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    rounding: str = "nearest",
    seed: Tensor | int | None = None,
    check_finite: bool = True,
    backend: str = "auto",
) -> Tensor:
    """W ← W + s B A, accumulated in float32 and rounded once to W's dtype. In place.

    Args:
        weight: W (N, K), any float dtype and strides; written, whether or not it requires grad.
        lora_a: A (R, K) and
        lora_b: B (N, R), any float dtype, moved to W's device, not rounded to W's dtype.
        scaling: s; its negative takes the correction out again, to within one rounding of the merged W.
        rounding: "nearest" (even), or "stochastic" for a bfloat16 W: to one of the two neighbours, with the
            probability that makes the mean exact, so that many small updates are not lost.
        seed: int64 scalar (tensor or int) of stochastic rounding. The bits drawn are a function of (seed, row,
            column), the same in every backend. Drawn from torch's generator when none is given.
        check_finite: refuse factors with NaN or Inf. Costs a pass over the factors and, on a GPU, a wait for it.
        backend: "auto", "reference", "cpu" (C++) or "triton". A named one runs or raises.

    Returns:
        weight.

    A float64 weight accumulates in float64 (reference). Deterministic. Nothing of W's size is allocated; only the
    C++ path makes a copy of a W whose columns are not adjacent.

    Raises:
        ValueError: shapes that do not fit, an expanded weight, a factor that is not finite, stochastic rounding of
            another dtype than bfloat16, a float16 weight whose sum leaves float16's range, a backend that is unknown or
            cannot run. W is then untouched.
        TypeError: something that is not a tensor of floats.
    """
    check_scaling("merge_lora_", scaling, getattr(weight, "dtype", torch.float32))
    if isinstance(weight, Tensor) and weight.dtype == torch.float16:
        check_merge_lora(weight, lora_a, lora_b, scaling)
        check_float16_range("merge_lora_", weight, lora_a, lora_b, scaling)
    direct = rounding == "nearest" and backend == "auto" and merges_directly(weight, lora_a, lora_b)
    if direct and (check_finite is False or (check_finite is True and all_finite(lora_a) and all_finite(lora_b))):
        merge_lora_directly_(weight, lora_a, lora_b, scaling)
        return weight
    _check("merge_lora_", weight, lora_a, lora_b, scaling, check_finite, backend)
    check_flag("merge_lora_", "check_finite", check_finite)
    if rounding not in ROUNDINGS:
        raise ValueError(f"merge_lora_: expected rounding to be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "stochastic" and weight.dtype != torch.bfloat16:
        raise ValueError(f"merge_lora_: expected a bfloat16 weight for stochastic rounding, got {weight.dtype}")
    bits = seed_tensor("merge_lora_", "seed", seed, weight.device) if rounding == "stochastic" else None
    return _merge(weight, lora_a, lora_b, scaling, None, None, bits, backend)


def merge_dora_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, column_scale: Tensor, *, scaling: float = 1.0, backend: str = "auto"
) -> Tensor:
    """W ← g ∘ (W + s B A), accumulated in float32 and rounded once to W's dtype. In place.

    Args:
        column_scale: g (N,), a factor for each row of W, which is a column of y.
        (the others, and the errors, as for :func:`merge_lora_`)

    Returns:
        weight.
    """
    _check("merge_dora_", weight, lora_a, lora_b, scaling, True, backend)
    _check_column_scale("merge_dora_", weight, column_scale)
    check_float16_range("merge_dora_", weight, lora_a, lora_b, scaling, column_scale)
    return _merge(weight, lora_a, lora_b, scaling, None, column_scale, None, backend)


def unmerge_dora_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, column_scale: Tensor, *, scaling: float = 1.0, backend: str = "auto"
) -> Tensor:
    """W ← W / g - s B A: takes out what :func:`merge_dora_` put in, to within one rounding of that. In place.

    Rows with g = 0 hold nothing of what they were: the caller keeps those.
    """
    _check("unmerge_dora_", weight, lora_a, lora_b, scaling, True, backend)
    _check_column_scale("unmerge_dora_", weight, column_scale)
    return _merge(weight, lora_a, lora_b, -scaling, 1.0 / column_scale, None, None, backend)


def _check_column_scale(op: str, weight: Tensor, column_scale: Tensor) -> None:
    if not isinstance(column_scale, Tensor):
        raise TypeError(f"{op}: expected column_scale to be a tensor, got {type(column_scale).__name__}")
    check_optional_vector(op, "column_scale", "N", column_scale, weight.shape[0], column_scale.device)


def _check(
    op: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, check_finite: bool, backend: str
) -> None:
    check_merge_lora(weight, lora_a, lora_b, scaling, op)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)) if check_finite else ():
        if not all_finite(factor):
            raise ValueError(f"{op}: expected finite factors, and {name} holds NaN or Inf")


def check_float16_range(
    op: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, scale: Tensor | None = None
) -> None:
    """Raise where W + s B A, times g, leaves float16's range: its infinities could not be taken out again."""
    if weight.dtype != torch.float16 or not weight.numel():
        return
    limit, most = torch.finfo(torch.float16).max, 1.0 if scale is None else float(scale.abs().max())
    longest = lora_b.float().norm(dim=1).max() * lora_a.float().norm(dim=0).max()
    if most * (float(weight.abs().max()) + abs(scaling) * float(longest)) <= limit:  # no element can
        return
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        a, b = lora_a.to(weight.device, torch.float32), lora_b[rows].to(weight.device, torch.float32)
        merged = weight[rows].float().addmm(b, a, alpha=scaling)
        if scale is not None:
            merged *= scale[rows, None].to(weight.device, torch.float32)
        if float(merged.abs().max()) > limit:
            raise ValueError(f"{op}: expected a merged weight within float16's range of {limit:g}, found larger values")


_ROWS = 1024  # of a weight that are looked at at once


def _merge(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    before: Tensor | None,
    after: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    before, after = (None if t is None else t.to(weight.device, wide).contiguous() for t in (before, after))
    lora_a, lora_b = lora_a.to(weight.device), lora_b.to(weight.device)
    call_merge_lora_(weight, lora_a, lora_b, scaling, before, after, seed, backend)
    return weight
