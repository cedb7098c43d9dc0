"""Sparse Matrix Tuning's kernels, as the tools see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..kernels import block_sparse as launchers
from ..kernels.block_sparse_tiles import block_grad_tiles
from ..kernels.target import Target
from .lora import FAMILY as LORA
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32
_WORDS = {_BF16: "bf16", _F16: "f16", _F32: "f32"}


def _empty(*shape: int, of: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def _grad(
    M: int, blocks: int, size: tuple[int, int], dtype: torch.dtype, out: torch.dtype, width: int = 4096
) -> LaunchCase:
    def run(target: Target) -> None:
        x, index = _empty(M, width, of=dtype), _empty(blocks, 2, of=torch.int32)
        tiles = block_grad_tiles(target, M, blocks, *size, dtype, aligned=width % 8 == 0)
        launchers.block_grad(x, _empty(M, width, of=dtype), index, size, out, tiles)

    words = f"block grad M={M} {blocks} of {size[0]}×{size[1]} {_WORDS[dtype]}/{_WORDS[out]}"
    return LaunchCase(words + (f" width={width}" if width != 4096 else ""), run)


def _adamw(size: int, blocks: torch.dtype, weight: torch.dtype, stochastic: bool = False) -> LaunchCase:
    def run(target: Target) -> None:
        packed = _empty(41, size, size, of=blocks)
        first, second = (_empty(41, size, size, of=_F32) for _ in range(2))
        seed = _empty(of=torch.int64) if stochastic else None
        tensors = packed, packed, first, second, _empty(4096, 4096, of=weight), _empty(41, 2, of=torch.int32)
        launchers.block_adamw_(*tensors, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, step=3, seed=seed)

    words = f"block adamw {size} {_WORDS[blocks]}/{_WORDS[weight]}" + (" stochastic" if stochastic else "")
    return LaunchCase(words, run)


def _write(size: int, blocks: torch.dtype, weight: torch.dtype) -> LaunchCase:
    def run(target: Target) -> None:
        launchers.write_blocks_(
            _empty(4096, 4096, of=weight), _empty(41, size, size, of=blocks), _empty(41, 2, of=torch.int32)
        )

    return LaunchCase(f"write blocks {size} {_WORDS[blocks]}/{_WORDS[weight]}", run)


def _cases() -> Iterator[LaunchCase]:
    for M, blocks in ((2048, 41), (2048, 1024), (16, 41)):
        yield _grad(M, blocks, (64, 64), _BF16, _F32)
    for size in ((16, 16), (32, 32), (48, 80), (128, 128), (256, 256)):
        yield _grad(2048, 41, size, _BF16, _BF16)
    yield _grad(2048, 41, (64, 64), _F16, _F16)
    yield _grad(2048, 41, (64, 64), _F32, _F32)
    yield _grad(2048, 41, (256, 256), _F32, _F32)
    yield _grad(2048, 41, (256, 256), _BF16, _F32, width=4097)  # no 16-byte rows: loads one by one
    yield _adamw(64, _F32, _F32)
    yield _adamw(256, _F32, _BF16)
    yield _adamw(64, _BF16, _BF16)
    yield _adamw(64, _BF16, _BF16, stochastic=True)
    yield _write(256, _F32, _BF16)
    yield _write(64, _F32, _F32)


def _grad_flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["M"] * a["index_ptr"].shape[0] * a["BM"] * a["BN"]


def _traced_tensors(dtype: torch.dtype, block_dtype: torch.dtype) -> Any:
    def tensors(device: str) -> tuple[Tensor, ...]:
        x = torch.randn(2, 24, 64, dtype=dtype, device=device, requires_grad=True)
        weight = torch.randn(48, 64, dtype=dtype, device=device)
        blocks = torch.randn(3, 16, 16, dtype=block_dtype, device=device, requires_grad=True)
        index = torch.zeros(3, 2, dtype=torch.int32, device=device)
        index[:, 0] = torch.arange(3, device=device)
        bias = torch.randn(48, dtype=dtype, device=device, requires_grad=True)
        columns = torch.zeros(1, dtype=torch.int32, device=device)
        return x, weight, blocks, index, bias, columns

    return tensors


def _plain(x: Tensor, weight: Tensor, blocks: Tensor, index: Tensor, bias: Tensor, columns: Tensor) -> Tensor:
    return functional.block_sparse_linear(x, weight, blocks, index)


def _with_columns(x: Tensor, weight: Tensor, blocks: Tensor, index: Tensor, bias: Tensor, columns: Tensor) -> Tensor:
    return functional.block_sparse_linear(x, weight, blocks, index, bias, columns=(columns, 16))


FAMILY = OpFamily(
    name="block_sparse",
    cases=_cases,
    work={
        "_block_grad_kernel": KernelWork(_grad_flops),
        "_block_adamw_kernel": KernelWork(
            lambda a: 12.0 * a["blocks_ptr"].shape[0] * a["BM"] * a["BN"],
            in_place=("blocks_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"),
            matrix=False,
        ),
        "_write_blocks_kernel": KernelWork(lambda a: 0.0, matrix=False),
        "_ordered_sum_kernel": LORA.work["_ordered_sum_kernel"],
    },
    traced=(
        Traced("bfloat16", _plain, _traced_tensors(_BF16, _BF16)),
        Traced("bias, float32 blocks, chosen columns", _with_columns, _traced_tensors(_BF16, _F32)),
    ),
)
