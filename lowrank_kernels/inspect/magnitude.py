"""Counts of magnitudes, as the tools see them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import functional
from ..kernels.magnitude import magnitude_histogram
from ..kernels.target import Target
from ..reference.magnitude import DIGITS
from .registry import KernelWork, LaunchCase, OpFamily, Traced


def _case(digit: int, dtype: torch.dtype) -> LaunchCase:
    def run(target: Target) -> None:
        magnitude_histogram(torch.empty(4096 * 4096, dtype=dtype, device="meta"), *DIGITS[digit], 0, target)

    return LaunchCase(f"magnitude digit={digit} {'f32' if dtype == torch.float32 else 'bf16'}", run)


def _cases() -> Iterator[LaunchCase]:
    for digit in range(len(DIGITS)):
        yield _case(digit, torch.float32)
    yield _case(0, torch.bfloat16)
    yield _case(1, torch.bfloat16)


def _large_alone(x: Tensor) -> Tensor:
    """x where its magnitude lies above that of half of the elements, to within a sixteenth of a power of two."""
    counts = functional.magnitude_histogram(x)
    middle = torch.searchsorted(counts.cumsum(0), x.numel() // 2)
    return torch.where((x.detach().float().view(torch.int32) & 0x7FFFFFFF) >> 19 > middle, x, 0.0)


FAMILY = OpFamily(
    name="magnitude",
    cases=_cases,
    work={"_magnitude_histogram_kernel": KernelWork(lambda a: 4.0 * a["elements"], matrix=False)},
    traced=(Traced("float32", _large_alone, lambda device: (torch.randn(24, 64, device=device, requires_grad=True),)),),
)
