"""Problems of GaLore's step, and its plain-PyTorch form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lowrank_kernels as lk

from . import Problem
from .lora import BF16, F16, F32

Sizes = tuple[int, int, int]  # K, N, R
SETTINGS: dict[str, Any] = {"step": 3, "lr": 0.1, "weight_decay": 0.2, "scale": 0.5}


def galore_tensors(sizes: Sizes, dtype: torch.dtype, basis_dtype: torch.dtype = F32) -> dict[str, Tensor]:
    """W, G, P and the moments in the middle of a run: no step is the quotient of two numbers near 0."""
    K, N, R = sizes
    generator = torch.Generator().manual_seed(K + 7 * N + 31 * R)
    basis = torch.linalg.qr(torch.randn(N, R, generator=generator)).Q if N else torch.zeros(0, R)
    return {
        "weight": torch.randn(N, K, generator=generator).to(dtype),
        "grad": torch.randn(N, K, generator=generator).to(dtype),
        "basis": basis.to(basis_dtype),
        "exp_avg": torch.randn(R, K, generator=generator),
        "exp_avg_sq": torch.rand(R, K, generator=generator) + 0.25,
    }


def stepped(t: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """W, m and v after a step, of the layouts that they had."""
    own = {name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).copy_(v) for name, v in t.items()}
    lk.galore_adam_(**own, **SETTINGS, backend=backend)
    return own["weight"], own["exp_avg"], own["exp_avg_sq"]


def eager_step(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in float32, or in float64 of such tensors."""
    wide = {name: v.to(torch.promote_types(v.dtype, F32)) for name, v in t.items()}
    low = wide["basis"].T @ wide["grad"]
    m = 0.9 * wide["exp_avg"] + 0.1 * low
    v = 0.999 * wide["exp_avg_sq"] + 0.001 * low * low
    direction = m / (1 - 0.9**3) / (v.sqrt() / math.sqrt(1 - 0.999**3) + 1e-8)
    after = (1 - 0.1 * 0.2) * wide["weight"] - 0.1 * 0.5 * (wide["basis"] @ direction)
    return after.to(t["weight"].dtype), m, v


def galore_problem(name: str, tensors: dict[str, Tensor]) -> Problem:
    """A step of copies. It has no gradient: only a factor of each row of W is differentiated."""
    names = tuple(tensors)
    ones = torch.ones(tensors["weight"].shape[0], 1, dtype=tensors["weight"].dtype, requires_grad=True)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return t["ones"] * stepped({name: t[name] for name in names}, backend)[0]

    def eager(t: dict[str, Tensor]) -> Tensor:
        return t["ones"] * eager_step({name: t[name] for name in names})[0]

    return Problem(f"galore: {name}", {**tensors, "ones": ones}, run, eager, rows="weight")


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield galore_problem(f"{dtype}", galore_tensors((136, 88, 16), dtype))
        turned = {name: t.mT.contiguous().mT for name, t in galore_tensors((136, 88, 16), dtype).items()}
        yield galore_problem(f"{dtype}, a transposed weight", turned)
    yield galore_problem("odd sizes", galore_tensors((131, 77, 7), F32))
    yield galore_problem("odd sizes, bfloat16 basis", galore_tensors((131, 77, 7), BF16, BF16))
    yield galore_problem("rank 1, one column", galore_tensors((1, 33, 1), F32))
    yield galore_problem("one row", galore_tensors((45, 1, 1), F32))
    yield galore_problem("a rank over two blocks", galore_tensors((70, 210, 150), F32))
    yield galore_problem("the whole rank", galore_tensors((50, 40, 40), BF16))
    every_other = {name: t.repeat_interleave(2, 1)[:, ::2] for name, t in galore_tensors((70, 40, 8), F32).items()}
    yield galore_problem("every other element", every_other)
    yield galore_problem("no column", galore_tensors((0, 40, 3), F32))
