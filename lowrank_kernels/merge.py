"""Adding a correction into the weight it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from .finite import all_finite
from .ops.library import traced
from .ops.merge import MergeLoRA, call_merge_lora_, check_merge_lora, plan_merge_lora
from .ops.operands import check_flag, raise_error, scaling_error, seed_tensor, vector_error

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
    op = "merge_lora_"
    call = _call(op, weight, lora_a, lora_b, scaling, backend)
    plan = None
    if traced():
        raise_error(check_merge_lora(call))
    else:
        plan = plan_merge_lora(call)
    check_flag(op, "check_finite", check_finite)
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: expected rounding to be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "stochastic":
        if weight.dtype != torch.bfloat16:
            raise ValueError(f"{op}: expected a bfloat16 weight for stochastic rounding, got {weight.dtype}")
        call = call._replace(seed=seed_tensor(op, "seed", seed, weight.device))
    if check_finite:
        _check_finite(op, call)
    check_float16_range(op, weight, lora_a, lora_b, scaling)
    call_merge_lora_(call, plan)
    return weight


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
    op = "merge_dora_"
    call = _checked(op, weight, lora_a, lora_b, scaling, backend)
    scale = _column_scale(op, weight, column_scale)
    check_float16_range(op, weight, lora_a, lora_b, scaling, column_scale)
    call_merge_lora_(call._replace(after=scale))
    return weight


def unmerge_dora_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, column_scale: Tensor, *, scaling: float = 1.0, backend: str = "auto"
) -> Tensor:
    """W ← W / g - s B A: takes out what :func:`merge_dora_` put in, to within one rounding of that. In place.

    Rows with g = 0 hold nothing of what they were: the caller keeps those.
    """
    op = "unmerge_dora_"
    call = _checked(op, weight, lora_a, lora_b, scaling, backend)
    call_merge_lora_(call._replace(scaling=-scaling, before=_column_scale(op, weight, column_scale, inverse=True)))
    return weight


def _call(op: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, backend: str) -> MergeLoRA:
    """The op's record, with the factors on W's device."""
    raise_error(scaling_error(op, scaling, getattr(weight, "dtype", torch.float32)))
    if isinstance(weight, Tensor):
        lora_a, lora_b = (
            t.to(weight.device) if isinstance(t, Tensor) and t.device != weight.device else t for t in (lora_a, lora_b)
        )
    return MergeLoRA(weight, lora_a, lora_b, scaling, None, None, None, backend)


def _checked(op: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, backend: str) -> MergeLoRA:
    """The op's record, of operands that fit together and are finite."""
    call = _call(op, weight, lora_a, lora_b, scaling, backend)
    raise_error(check_merge_lora(call, op))
    _check_finite(op, call)
    return call


def _check_finite(op: str, call: MergeLoRA) -> None:
    for name, factor in (("lora_a", call.lora_a), ("lora_b", call.lora_b)):
        if not all_finite(factor):
            raise ValueError(f"{op}: expected finite factors, and {name} holds NaN or Inf")


def _column_scale(op: str, weight: Tensor, column_scale: Tensor, *, inverse: bool = False) -> Tensor:
    """g, or its inverse, as the op reads it."""
    if not isinstance(column_scale, Tensor):
        raise TypeError(f"{op}: expected column_scale to be a tensor, got {type(column_scale).__name__}")
    raise_error(vector_error(op, "column_scale", "N", column_scale, weight.shape[0], column_scale.device))
    scale = 1.0 / column_scale if inverse else column_scale
    return scale.to(weight.device, torch.promote_types(weight.dtype, torch.float32)).contiguous()


def check_float16_range(
    op: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, scale: Tensor | None = None
) -> None:
    """Raise where W + s B A, times g, leaves float16's range: its infinities could not be taken out again."""
    if weight.dtype != torch.float16 or not weight.numel():
        return
    weight, lora_a, lora_b = (t.detach() for t in (weight, lora_a, lora_b))
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
