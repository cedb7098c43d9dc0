"""A stack of reversible layers, forward and inverse, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Halves = Sequence[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]


def reversible_ref(h: Tensor, halves: Halves, lam: float, beta: float, switch: bool) -> Tensor:
    """x1 = x2 = h; for each (F, G): y1 = λ x1 + F(x2), y2 = β x2 + G(y1); with ``switch`` (x1, x2) = (y2, y1).
    Returns (x1 + x2) / 2. Source: Liao et al., arXiv 2306.00477, section 3."""
    x1 = x2 = h
    for f, g in halves:
        y1 = lam * x1 + f(x2)
        y2 = beta * x2 + g(y1)
        x1, x2 = (y2, y1) if switch else (y1, y2)
    return (x1 + x2) / 2
