"""Merging a correction into its weight, as the tools see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.merge import merge_lora_
from ..kernels.target import Target
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F32 = torch.bfloat16, torch.float32


def _case(R: int, dtype: torch.dtype, kind: str = "", width: int = 4096) -> LaunchCase:
    """kind: "" for LoRA's merge, "stochastic", "scaled" for DoRA's, "unscaled" for taking that out."""

    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = _F32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        before, after = (empty(4096) if kind == k else None for k in ("unscaled", "scaled"))
        seed = empty(of=torch.int64) if kind == "stochastic" else None
        operands = empty(4096, width, of=dtype), empty(R, width), empty(4096, R)
        merge_lora_(*operands, 0.5, target, before=before, after=after, seed=seed)

    words = ["merge", f"R={R}", "f32" if dtype == _F32 else "bf16/f32", kind, "" if width == 4096 else f"width={width}"]
    return LaunchCase(" ".join(w for w in words if w), run)


def _cases() -> Iterator[LaunchCase]:
    for R in (16, 64, 256):
        yield _case(R, _BF16)
    yield _case(16, _F32)
    for kind in ("stochastic", "scaled", "unscaled"):
        yield _case(16, _BF16, kind)
    yield _case(16, _BF16, width=4097)


def _flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["N"] * a["K"] * (a["R"] + 1)


def _merged_product(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    merged = weight.clone()
    torch.ops.lowrank_kernels.merge_lora_(merged, lora_a, lora_b, 0.5, None, None, None, "auto")
    return x @ merged.T


def _traced_tensors(device: str) -> tuple[Tensor, ...]:
    x = torch.randn(24, 64, dtype=_BF16, device=device, requires_grad=True)
    return (
        x,
        torch.randn(48, 64, dtype=_BF16, device=device),
        torch.randn(8, 64, device=device),
        torch.randn(48, 8, device=device),
    )


FAMILY = OpFamily(
    name="merge",
    cases=_cases,
    work={"_merge_lora_kernel": KernelWork(_flops, in_place=("w_ptr",), matrix=False)},
    traced=(Traced("bfloat16", _merged_product, _traced_tensors),),
)
