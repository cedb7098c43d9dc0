"""Problems of SVFT's linear, and its plain-PyTorch form."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lowrank_kernels as lk

from . import Problem
from .lora import BF16, F16, F32


def places(rows: int, columns: int, count: int | None = None, band: int = 0) -> Tensor:
    """(2, E) of M (rows, columns): ``count`` at random, or a diagonal with ``band`` others on each side; ascending."""
    if count is None:
        flat = [i * columns + j for i in range(rows) for j in range(columns) if abs(i - j) <= band]
    else:
        flat = sorted(random.Random(count).sample(range(rows * columns), count))
    return torch.tensor([[p // columns for p in flat], [p % columns for p in flat]])


def svft_tensors(
    sizes: tuple[int, int, int], index: Tensor, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool = False
) -> dict[str, Tensor]:
    """Random inputs, values of M included, whose products have about unit variance. ``sizes``: M, K, N."""
    (M, K, N), (rows, columns) = sizes, shape
    generator = torch.Generator().manual_seed(0)

    def random_(*size: int, scale: float = 1.0, of: torch.dtype = dtype, grad: bool = False) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(of).requires_grad_(grad)

    count = index.shape[1]
    tensors = {
        "x": random_(M, K, grad=True),
        "weight": random_(N, K, scale=max(K, 1) ** -0.5),
        "u": random_(N, rows, scale=rows**-0.5),
        "vh": random_(columns, K, scale=max(K, 1) ** -0.5),
        "values": random_(count, scale=(rows / count) ** 0.5, of=F32, grad=True),
        "pattern": lk.svft_pattern(index, rows, columns),
    }
    return tensors | ({"bias": random_(N, grad=True)} if bias else {})


def eager_svft_linear(t: dict[str, Tensor], index: Tensor) -> Tensor:
    """What one would write with PyTorch alone: M is dense, and every step rounds to x's dtype."""
    x, u, vh = t["x"], t["u"], t["vh"]
    m = t["values"].new_zeros(u.shape[1], len(vh)).index_put((index[0], index[1]), t["values"]).to(x.dtype)
    return torch.nn.functional.linear(x, t["weight"], t.get("bias")) + ((x @ vh.T) @ m.T) @ u.T


def svft_problem(
    name: str, sizes: tuple[int, int, int], index: Tensor, shape: tuple[int, int], dtype: torch.dtype, **options: Any
) -> Problem:
    tensors = svft_tensors(sizes, index, shape, dtype, **options)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return lk.svft_linear(**t, backend=backend)

    return Problem(f"svft: {name}", tensors, run, lambda t: eager_svft_linear(t, index))


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield svft_problem(f"{dtype}, plain", (70, 136, 88), places(88, 88), (88, 88), dtype)
    yield svft_problem("banded, bias", (40, 64, 72), places(64, 64, band=3), (64, 64), BF16, bias=True)
    yield svft_problem("odd sizes, random", (67, 131, 77), places(77, 45, 150), (77, 45), F32, bias=True)
    yield svft_problem("odd sizes, half precision", (35, 45, 77), places(31, 45, 90), (31, 45), BF16)
    yield svft_problem("full", (33, 20, 24), places(20, 20, 400), (20, 20), F32)
    yield svft_problem("one value", (18, 40, 30), places(1, 1), (1, 1), BF16)
    yield svft_problem("a long row", (20, 40, 130), places(3, 100, 120), (3, 100), F32)
    yield svft_problem("one token", (1, 40, 24), places(24, 24), (24, 24), BF16)
    yield svft_problem("no token", (0, 40, 24), places(24, 24), (24, 24), BF16, bias=True)
