"""SVFT, as the tools see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..kernels.svft import svft_grad, svft_multiply
from ..kernels.target import Target
from .lora import FAMILY as LORA
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F32 = torch.bfloat16, torch.float32


def _case(dtype: torch.dtype, width: int = 4096) -> LaunchCase:
    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = _F32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        rows, values = empty(2048, width, of=dtype), empty(9 * width)
        pattern = empty(3 * len(values) + 2 * width + 2, of=torch.int32)
        for turned in (False, True):
            svft_multiply(rows, values, pattern, width, turned)
        svft_grad(rows, rows, pattern, len(values))

    return LaunchCase(f"svft {'f32' if dtype == _F32 else 'bf16'}" + ("" if width == 4096 else f" width={width}"), run)


def _cases() -> Iterator[LaunchCase]:
    yield _case(_BF16)
    yield _case(_F32)
    yield _case(_BF16, width=4097)


def _multiply_flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["M"] * a["values_ptr"].shape[0]


def _traced_tensors(device: str) -> tuple[Tensor, ...]:
    def normal(*shape: int, of: torch.dtype = _BF16) -> Tensor:
        return torch.randn(*shape, dtype=of, device=device)

    x, values = normal(2, 24, 64).requires_grad_(), normal(48, of=_F32).requires_grad_()
    # The diagonal's, as svft_pattern makes it: that reads values, which fake tensors have not.
    pattern = torch.cat([torch.arange(size, dtype=torch.int32, device=device) for size in (48, 48, 48, 49, 49)])
    return x, normal(48, 64), normal(48, 48), normal(48, 64), values, pattern


FAMILY = OpFamily(
    name="svft",
    cases=_cases,
    work={
        "_svft_multiply_kernel": KernelWork(_multiply_flops, matrix=False),
        "_svft_grad_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["E"], matrix=False),
        "_ordered_sum_kernel": LORA.work["_ordered_sum_kernel"],
    },
    traced=(Traced("bfloat16", functional.svft_linear, _traced_tensors),),
)
