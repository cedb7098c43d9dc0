"""What an optimizer's settings can be, said once: numbers in their range, refused by name."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def check_number(op: str, name: str, value: Any, *, below: float = math.inf, wanted: str = "of at least 0") -> None:
    """Raise TypeError or ValueError, in the op's name, unless ``value`` is a number from 0 to below ``below``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected {name} to be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: expected {name} to be finite, got {value!r}")
    if not 0.0 <= value < below:
        raise ValueError(f"{op}: expected {name} {wanted}, got {value!r}")


def check_betas(op: str, betas: Any, *, wanted: str = "of at least 0 and below 1") -> None:
    """Raise TypeError or ValueError, in the op's name, unless ``betas`` are two numbers from 0 to below 1."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{op}: expected betas to be two numbers, got {betas!r}")
    for beta in betas:
        check_number(op, "betas", beta, below=1.0, wanted=wanted)


def check_model(op: str, model: Any) -> None:
    """Raise TypeError, in the op's name, unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")
