"""How many elements there are of each magnitude, as the formula says."""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = ((12, 19), (10, 9), (9, 0))
"""(bits, how many lie below) of the three digits of a float32's magnitude, which has 31 bits."""


def magnitude_histogram_ref(values: Tensor, *, digit: int = 0, leading: int = 0) -> Tensor:
    """Counts (2^bits,) int64 of a digit of |x| as float32, over the elements whose higher bits are ``leading``.

    Args:
        values: of any shape and float dtype; float64 is rounded.  digit: 0, 1 or 2; see ``DIGITS``.
    """
    bits, shift = DIGITS[digit]
    magnitude = values.flatten().to(torch.float32).view(torch.int32) & 0x7FFFFFFF
    chosen = magnitude[magnitude >> (bits + shift) == leading]
    return torch.bincount((chosen >> shift) & ((1 << bits) - 1), minlength=1 << bits)
