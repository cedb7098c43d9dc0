"""LoRAPrune's importance, as the tools see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..kernels.importance import lora_importance
from ..kernels.importance_tiles import importance_tiles
from ..kernels.target import Target
from .lora import FAMILY as LORA
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F32 = torch.bfloat16, torch.float32


def _case(R: int, dtype: torch.dtype, dim: str = "rows", width: int = 4096) -> LaunchCase:
    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = _F32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        weight, a, b = empty(4096, width, of=dtype), empty(R, width), empty(4096, R)
        if dim == "columns":
            weight, a, b = weight.T, b.T, a.T
        lora_importance(weight, a, b, a, b, 0.5, importance_tiles(target, *weight.shape))

    words = ["importance", f"R={R}", "f32" if dtype == _F32 else "bf16/f32", dim]
    return LaunchCase(" ".join(words) + ("" if width == 4096 else f" width={width}"), run)


def _cases() -> Iterator[LaunchCase]:
    for dim in ("rows", "columns"):
        for R in (8, 16, 32, 64):
            yield _case(R, _BF16, dim)
        yield _case(8, _F32, dim)
        yield _case(8, _BF16, dim, width=4097)


def _flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["N"] * a["K"] * (3 * a["R"] + 2)


def _scaled(x: Tensor, *operands: Tensor) -> Tensor:
    """x in which input channels count by their importance."""
    return x * functional.lora_importance(*operands, scaling=0.5, dim="columns")


def _traced_tensors(device: str) -> tuple[Tensor, ...]:
    x = torch.randn(24, 64, device=device, requires_grad=True)
    factors = (torch.randn(*shape, device=device) for shape in ((8, 64), (48, 8), (8, 64), (48, 8)))
    return x, torch.randn(48, 64, dtype=_BF16, device=device), *factors


FAMILY = OpFamily(
    name="importance",
    cases=_cases,
    work={
        "_lora_importance_kernel": KernelWork(_flops, matrix=False),
        "_ordered_sum_kernel": LORA.work["_ordered_sum_kernel"],
    },
    traced=(Traced("bfloat16", _scaled, _traced_tensors),),
)
