"""Problems of counts of magnitudes, and their plain-PyTorch form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lowrank_kernels as lk

from . import Problem
from .lora import BF16, F16, F32

BINS = (4096, 1024, 512)


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers of both signs over some powers of two, with zeros, equal ones and an infinite one among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    found = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator)
    flat = found.flatten()
    flat[::7] = 0.5
    flat[3::11] = 0.0
    flat[-1:] = -torch.inf
    return found.to(dtype)


def eager_counts(values: Tensor, digit: int, leading: int) -> Tensor:
    """Of integers as NumPy would count them."""
    magnitude = values.detach().float().abs().contiguous().view(torch.int32).flatten().long()
    below = (2**19, 2**9, 1)[digit]
    chosen = magnitude[magnitude // (below * BINS[digit]) == leading]
    return torch.zeros(BINS[digit], dtype=torch.int64).index_add_(
        0, chosen // below % BINS[digit], torch.ones_like(chosen)
    )


def magnitude_problem(name: str, values: Tensor, digit: int = 0, leading: int = 0) -> Problem:
    """Counts are constants to autograd: only a factor of each is differentiated."""
    ones = torch.ones(BINS[digit], requires_grad=True)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return t["ones"] * lk.magnitude_histogram(t["values"], digit=digit, leading=leading, backend=backend)

    def eager(t: dict[str, Tensor]) -> Tensor:
        return t["ones"] * eager_counts(t["values"], digit, leading)

    return Problem(f"magnitude: {name}", {"values": values, "ones": ones}, run, eager)


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield magnitude_problem(f"{dtype}", values_of((136, 88), dtype))
    yield magnitude_problem("second digit", values_of((131, 77), F32), 1, 2016)  # from 0.5 on
    yield magnitude_problem("third digit", values_of((131, 77), F32), 2, 2016 << 10)
    yield magnitude_problem("several blocks, a vector", values_of((20001,), F32))
    yield magnitude_problem("columns adjacent", values_of((70, 33), BF16).mT.contiguous().mT)
    yield magnitude_problem("every other element", values_of((45, 33), F32).repeat_interleave(2, 1)[:, ::2])
    yield magnitude_problem("one element", values_of((1, 1, 1), F32))
    yield magnitude_problem("nothing", values_of((0, 5), F32))
