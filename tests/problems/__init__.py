"""Problems that every op family must solve: one list, read by every suite that is not about one op alone.

A family is one module here with ``problems()``, found by its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_kernels.families import NAMES


@dataclass(frozen=True)
class Problem:
    """One call of a public function, on random inputs of both signs.

    Attributes:
        tensors: inputs by name; those that require grad are differentiated.
        run: the public function on such tensors, with the backend asked for; float64 with "reference" is the oracle.
        eager: the same from plain PyTorch operations.
        rows: name of the input whose rows do not depend on each other; (tokens, features).
    """

    name: str
    tensors: dict[str, Tensor]
    run: Callable[[dict[str, Tensor], str], Tensor]
    eager: Callable[[dict[str, Tensor]], Tensor]
    rows: str = "x"


def problems(families: Iterable[str] = NAMES) -> list[Problem]:
    """The problems of all families, or of those named."""
    return [p for name in families for p in importlib.import_module(f"{__name__}.{name}").problems()]


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Fresh leaves with the same values, strides and need of gradients, floating ones in ``dtype``."""
    return {
        name: (t.detach() if dtype is None or not t.is_floating_point() else t.detach().to(dtype)).requires_grad_(
            t.requires_grad
        )
        for name, t in tensors.items()
    }


def differentiate(function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], seed: int = 1):  # type: ignore[no-untyped-def]
    """(y, gradients by name) for a random dY that depends on nothing but ``seed`` and y's shape."""
    y = function(tensors)
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Rounded to half precision, so that float64 and half precision see the same dY.
    grads = torch.autograd.grad(y, list(wanted.values()), grad_y.to(torch.bfloat16).to(y.dtype))
    return y.detach(), dict(zip(wanted, grads, strict=True))
