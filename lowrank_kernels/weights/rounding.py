"""How an encoder chooses a code: the nearest value, or one of the two neighbours so that the mean is exact."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")


def check_rounding(op: str, rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: expected rounding to be one of {', '.join(ROUNDINGS)}, got {rounding!r}")


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The place in ``values``, ascending, of the value nearest to each element; the lower one of two that are."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def stochastic(x: Tensor, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The place of one of the two ``values`` around each element, the upper one with the probability that makes the
    mean x. Elements beyond the ends go to them."""
    upper = torch.bucketize(x, values).clamp(1, len(values) - 1)
    below, above = values[upper - 1], values[upper]
    drawn = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where((x - below) > drawn * (above - below), upper, upper - 1)
