"""Problems of LoRAPrune's importance, and its plain-PyTorch form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lowrank_kernels as lk

from . import Problem
from .lora import BF16, F16, F32

Sizes = tuple[int, int, int]  # K, N, R


def importance_tensors(sizes: Sizes, dtype: torch.dtype, factor_dtype: torch.dtype) -> dict[str, Tensor]:
    """W, A, B and the gradients of both, of one size each: no term of the formula is small beside the others."""
    K, N, R = sizes
    generator = torch.Generator().manual_seed(K + 7 * N + 31 * R)
    shapes = {"weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "grad_a": (R, K), "grad_b": (N, R)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made |= {name: made[name] / R**0.5 for name in ("lora_b", "grad_b")}
    return {name: t.to(dtype if name == "weight" else factor_dtype) for name, t in made.items()}


def eager_importance(t: dict[str, Tensor], scaling: float, dim: str) -> Tensor:
    """The formula in float32, or in float64 of such tensors."""
    w, a, b, da, db = (v.to(torch.promote_types(v.dtype, F32)) for v in t.values())
    update = db @ a + b @ da - db @ da
    return (update * (w + scaling * (b @ a))).square().sum(1 if dim == "rows" else 0)


def importance_problem(name: str, tensors: dict[str, Tensor], dim: str, scaling: float = 0.75) -> Problem:
    """Sums that are constants to autograd: only a factor of each is differentiated."""
    names = tuple(tensors)
    ones = torch.ones(tensors["weight"].shape[dim == "columns"], requires_grad=True)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        operands = (t[name] for name in names)
        return t["ones"] * lk.lora_importance(*operands, scaling=scaling, dim=dim, backend=backend)

    def eager(t: dict[str, Tensor]) -> Tensor:
        return t["ones"] * eager_importance({name: t[name] for name in names}, scaling, dim)

    return Problem(f"importance: {name}, {dim}", {**tensors, "ones": ones}, run, eager, rows="weight")


def problems() -> Iterator[Problem]:
    for dim in ("rows", "columns"):
        for dtype in (BF16, F16, F32):
            yield importance_problem(f"{dtype}", importance_tensors((136, 88, 16), dtype, dtype), dim)
        yield importance_problem("float32 factors", importance_tensors((131, 77, 7), BF16, F32), dim)
        yield importance_problem("rank 1", importance_tensors((45, 33, 1), F32, F32), dim)
        yield importance_problem("rank 100, one row", importance_tensors((301, 1, 100), F32, F32), dim)
        yield importance_problem("one column", importance_tensors((1, 150, 5), F32, BF16), dim)
        turned = {name: t.mT.contiguous().mT for name, t in importance_tensors((70, 90, 8), BF16, F32).items()}
        yield importance_problem("columns adjacent", turned, dim)
        every_other = {
            name: t.repeat_interleave(2, 1)[:, ::2] for name, t in importance_tensors((70, 90, 8), F32, F32).items()
        }
        yield importance_problem("every other element", every_other, dim)
        yield importance_problem("no row", importance_tensors((40, 0, 3), F32, F32), dim)
        yield importance_problem("no column", importance_tensors((0, 40, 3), BF16, F32), dim)
