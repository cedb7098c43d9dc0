"""What the launchers of all kernels share: dropout's arguments, precision, tensor descriptors, ordered sums."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import _ordered_sum_kernel

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
KEEP_ALL = (None, 0, 1.0)
"""``dropout_arguments`` where there is no dropout."""


def dropout_arguments(dropout_p: float, dropout_seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold as an int32 bit pattern, 1 / (1 - p)); seed None: no dropout."""
    if dropout_p == 0.0:
        return KEEP_ALL
    threshold = int(dropout_p * 2.0**32)
    return dropout_seed, threshold - 2**32 if threshold >= 2**31 else threshold, 1.0 / (1.0 - dropout_p)


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: as PyTorch is told to multiply float32 matrices."""
    if dtype != torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def describe(use_tma: bool, *tensors_and_blocks: tuple[Tensor, list[int]]) -> list[Any]:
    """Tensors as kernels take them: descriptors of tiles of these shapes where hardware copies them, else pointers."""
    if not use_tma:
        return [tensor for tensor, _ in tensors_and_blocks]
    return [TensorDescriptor(t, list(t.shape), list(t.stride()), block) for t, block in tensors_and_blocks]


def ordered_sum(partial: Tensor, out: Tensor, tail: Tensor | None = None) -> Tensor:
    """Sum the partials (count, …) into ``out`` and, where a row of them is longer, ``tail``."""
    block, numel = 1024, partial[0].numel()
    _ordered_sum_kernel[(triton.cdiv(numel, block),)](
        partial, out, tail, partial.shape[0], out.numel(), numel, BLOCK=block, num_warps=4
    )
    return out
