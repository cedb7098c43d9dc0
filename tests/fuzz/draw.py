"""Random sizes, values and layouts."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Draw:
    """Everything random in a call, from its seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def one_of(self, *values):  # type: ignore[no-untyped-def]
        return self.random.choice(values)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def tokens(self) -> int:
        return self.one_of(0, 1, 1, 2, 3, 5, 8, 9, 16, 17, 33, 40, 70, self.random.randint(1, 140))

    def width(self) -> int:
        return self.one_of(0, 1, 2, 7, 16, 17, 31, 32, 33, 48, 64, 65, self.random.randint(1, 150))

    def rank(self) -> int:
        return self.one_of(1, 1, 2, 3, 7, 8, 16, 17, 33, self.random.randint(1, 80))

    def dtype(self) -> torch.dtype:
        """Of x and W."""
        return self.one_of(F32, F32, F32, BF16, BF16, BF16, F16, F16, F64)

    def any_dtype(self, like: torch.dtype) -> torch.dtype:
        """Of an operand that may have one of its own."""
        return self.one_of(like, like, F32, F32, BF16, F16, F64)

    def scaling(self) -> float:
        return self.one_of(1.0, 2.0, 0.25, -1.5, 0.0, 1e-3, self.random.uniform(-4, 4))

    def normal(self, *shape: int, of: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator, dtype=F64)).to(of)

    def positive(self, *shape: int, of: torch.dtype) -> Tensor:
        return (0.25 + torch.rand(shape, generator=self.generator, dtype=F64)).to(of)

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values, or one of them everywhere, in some layout; NaN in the memory between them."""
        return self.one_of(_plain, _plain, _every_other, _apart, _turned, _skipped, _expanded)(t)

    def laid_out_as_it_is(self, t: Tensor) -> Tensor:
        """The same values in some layout."""
        return self.one_of(_plain, _every_other, _apart, _turned, _skipped)(t)


def _around(t: Tensor, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor:
    memory = torch.full(shape, float("nan") if t.is_floating_point() else -99, dtype=t.dtype)
    inside = view(memory)
    inside.copy_(t)
    return inside


def _plain(t: Tensor) -> Tensor:
    return t


def _every_other(t: Tensor) -> Tensor:
    return _around(t, (*t.shape[:-1], 2 * t.shape[-1]), lambda m: m[..., ::2])


def _apart(t: Tensor) -> Tensor:
    return _around(t, (*t.shape[:-1], t.shape[-1] + 3), lambda m: m[..., 1:-2])


def _skipped(t: Tensor) -> Tensor:
    return _around(t, (2 * t.shape[0], *t.shape[1:]), lambda m: m[::2])


def _turned(t: Tensor) -> Tensor:
    return t if t.dim() < 2 else t.mT.contiguous().mT


def _expanded(t: Tensor) -> Tensor:
    """All rows the first one; of a vector, all elements."""
    return t if t.shape[0] == 0 else t[:1].clone().expand(t.shape)
