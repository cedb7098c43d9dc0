"""What a family's module here consists of: benchmark rows and tunables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import tuned
from ...kernels.roofline import Work
from ...kernels.target import Target

Shape = Mapping[str, int]
Inputs = dict[str, Any]
Provider = Callable[..., Tensor]
"""Inputs to result; that of an op of ours takes ``backend`` too."""


@dataclass(frozen=True)
class Problem:
    """One row's operands. ``trained`` names the inputs that get a gradient; none for inference."""

    shape: Shape
    dtype: torch.dtype
    training: bool


@dataclass(frozen=True)
class Bench:
    """One row of the table: an op, its shapes, what it is compared with, and what it costs by formula.

    Attributes:
        shapes: default shapes, small enough for a CPU; the long list of a GPU is ``gpu_shapes``.
        make: (shape, dtype, device) -> inputs.
        providers: name -> call; "floor" is what there would be without the op (the frozen linear), where there is such
            a thing, and is what others are compared with; else "plain" is.
        exact: the formula, for float64 inputs.
        trained: inputs that get a gradient in training; empty where the op has no backward.
        nbytes, flops: (shape, itemsize) and (shape,) -> those of the forward, each tensor once.
        launches: (target, shape, dtype) -> (the rule's choice in words, what our Triton kernels move and multiply):
            more than ``nbytes`` where an operand is read again, or an intermediate one is written. None where there
            are no such kernels.
    """

    name: str
    shapes: tuple[Shape, ...]
    gpu_shapes: tuple[Shape, ...]
    make: Callable[[Shape, torch.dtype, torch.device], Inputs]
    providers: Mapping[str, Provider]
    exact: Provider
    nbytes: Callable[[Shape, int], float]
    flops: Callable[[Shape], float]
    launches: Callable[[Target, Shape, torch.dtype], tuple[str, tuple[Work, ...]]] | None = None
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tunable:
    """What there is to choose for one op on one kind of device.

    Attributes:
        op: the name that the op's plan is settled by.
        bench: the name of the benchmark row that measures it.
        sizes: those sizes of a shape that the op's plan is settled by.
        candidates: fields of the op's plan beside the rule's; what a plan does not take for a shape runs the rule, and
            ties with it.
        training: measured forward and backward, the forward as the table already has it.
    """

    op: str
    bench: str
    sizes: tuple[str, ...]
    candidates: tuple[tuned.Fields, ...]
    training: bool = False

    def key(self, problem: Problem) -> str:
        return tuned.shape_class(self.op, problem.dtype, {name: problem.shape[name] for name in self.sizes})


PRODUCT, FACTORS = ("M", "K", "N"), ("K", "N", "R")
"""Sizes of a product with W, and of W with its factors."""
REFERENCE: tuned.Fields = {"backend": "reference"}
EAGER: tuned.Fields = {"eager": True}
BASES: tuple[tuned.Fields, ...] = ({"base": "own"}, {"base": "library"})
# Tiles cut rows and columns of the result alone, never the reduction: a row's sum keeps its order.
_TILES: tuple[tuned.Fields, ...] = (
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 5},
)


def strategies(*names: str) -> tuple[tuned.Fields, ...]:
    """Each strategy with the rule's tiles, the library's product, and each with other tiles."""
    plain = [{"strategy": name} for name in (*names, "library")]
    return *plain, *({"strategy": name, **tiles} for name in names for tiles in _TILES)


def shapes_of(*rows: tuple[int, ...], names: str = "M K N R") -> tuple[Shape, ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


GPU_WIDTHS = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (8192, 28672), (28672, 8192))
"""(K, N) of the linears of large models."""
CPU_LINEAR = shapes_of((16, 2048, 2048, 16), (1024, 2048, 2048, 16), (64, 4096, 1024, 64), (256, 1024, 4096, 8))
GPU_LINEAR = shapes_of(*((m, k, n, r) for k, n in GPU_WIDTHS for m in (1, 16, 64, 2048, 8192) for r in (16, 64)))


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)
