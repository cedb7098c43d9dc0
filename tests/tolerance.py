"""The tolerance rule of all tests: as exact as plain PyTorch, measured against float64.

A kernel's error against a float64 oracle may be at most ``factor`` times the error that eager PyTorch makes in the same
dtype on the same inputs, plus a few units in the last place of each element. So no test carries a magic number, and a
kernel that rounds once more than it should is found at every size.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
ULPS = 2.0


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from each value to the next one of ``dtype``, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.double().abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def assert_as_exact_as_eager(
    ours: Tensor, eager: Tensor, oracle: Tensor, *, factor: float = OUTPUT_FACTOR, ulps: float = ULPS, what: str = ""
) -> None:
    """Fail unless |ours - oracle| <= factor · max|eager - oracle| + ulps · ulp(oracle), element by element, and the
    same holds of the root mean squares.

    Args:
        ours: what a kernel gave. NaN or infinity where the oracle is finite fails.
        eager: what plain PyTorch gives in the same dtype.
        oracle: the result from float64 inputs.
    """
    assert ours.shape == oracle.shape, f"{what}: expected shape {tuple(oracle.shape)}, got {tuple(ours.shape)}"
    assert ours.dtype == eager.dtype, f"{what}: expected {eager.dtype}, got {ours.dtype}"
    if not oracle.numel():
        return
    wrong = ~torch.isfinite(ours) & torch.isfinite(oracle)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite"
    error, eager_error = (ours.double() - oracle).abs(), (eager.double() - oracle).abs()
    unit = ulp(oracle, ours.dtype)
    excess = error - (factor * eager_error.max() + ulps * unit)
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: element {worst} of {tuple(ours.shape)} is {ours.flatten()[worst]:.6g}, the oracle says "
        f"{oracle.flatten()[worst]:.6g}; error {error.flatten()[worst]:.3g}, eager's largest {eager_error.max():.3g}"
    )
    root = error.square().mean().sqrt()
    allowed = factor * eager_error.square().mean().sqrt() + ulps * unit.square().mean().sqrt()
    assert root <= allowed, f"{what}: root mean square error {root:.3g}, allowed {allowed:.3g}"
