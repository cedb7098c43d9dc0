"""Whether a tensor holds a NaN or an infinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """True if every element is finite, also for a tensor without elements.

    No sum with a NaN or an infinity in it is finite. Where the sum is not, it may have overflowed: then the least and
    the greatest are asked, which a NaN becomes both of. One reading nearly always, nothing written: on a CPU a fraction
    of the time of ``torch.isfinite(tensor).all()``.
    """
    tensor = tensor.detach()
    return math.isfinite(tensor.sum().item()) or all(math.isfinite(end.item()) for end in torch.aminmax(tensor))
