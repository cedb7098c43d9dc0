"""GaLore's step, as the tools see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.galore import galore_adam_
from ..kernels.target import Target
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F32 = torch.bfloat16, torch.float32


def _case(R: int, dtype: torch.dtype, tall: bool = False, width: int = 4096) -> LaunchCase:
    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = _F32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        operands = [empty(2048, width, of=dtype), empty(2048, width, of=dtype), empty(2048, R)]
        moments = [empty(R, width), empty(R, width)]
        if tall:
            operands[:2] = [empty(width, 2048, of=dtype).T, empty(width, 2048, of=dtype).T]
            moments = [empty(width, R).T, empty(width, R).T]
        numbers: dict[str, Any] = {"rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "keep": 0.5, "inverse_root": 3.0}
        weight, grad, basis = operands
        galore_adam_(weight, grad, basis, moments[0], moments[1], target, **numbers)

    words = ["galore", f"R={R}", "f32" if dtype == _F32 else "bf16", "tall" if tall else ""]
    return LaunchCase(" ".join(w for w in words if w) + ("" if width == 4096 else f" width={width}"), run)


def _cases() -> Iterator[LaunchCase]:
    for tall in (False, True):
        for R in (16, 32, 128):
            yield _case(R, _BF16, tall)
        yield _case(128, _F32, tall)
    yield _case(128, _BF16, width=4097)


def _flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["N"] * a["K"] * a["R"]


def _stepped_product(x: Tensor, weight: Tensor, grad: Tensor, basis: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    stepped, m, v = weight.clone(), mean.clone(), root.square() + 1.0
    numbers = 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.25, 3
    torch.ops.lowrank_kernels.galore_adam_(stepped, grad, basis, m, v, *numbers, "auto")
    return x @ stepped.T


def _traced_tensors(device: str) -> tuple[Tensor, ...]:
    x = torch.randn(24, 64, dtype=_BF16, device=device, requires_grad=True)
    weight, grad = (torch.randn(48, 64, dtype=_BF16, device=device) for _ in range(2))
    return x, weight, grad, *(torch.randn(*shape, device=device) for shape in ((48, 8), (8, 64), (8, 64)))


FAMILY = OpFamily(
    name="galore",
    cases=_cases,
    work={
        "_galore_project_kernel": KernelWork(_flops, in_place=("m_ptr", "v_ptr"), matrix=False),
        "_galore_write_kernel": KernelWork(_flops, in_place=("w_ptr",), matrix=False),
    },
    traced=(Traced("bfloat16", _stepped_product, _traced_tensors),),
)
