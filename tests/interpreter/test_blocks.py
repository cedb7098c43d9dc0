"""Blocks over the Triton kernels: the same results and gradients as the kernels of their parts give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import LoRAPart

M, K, F, N = 19, 24, 20, 18


def part(n: int, k: int, rank: int, dtype: torch.dtype, generator: Any, *, dora: bool) -> LoRAPart:
    weight, a, b = (torch.randn(*size, generator=generator) * 0.3 for size in ((n, k), (rank, k), (n, rank)))
    magnitude = torch.rand(n, generator=generator).add(0.5).requires_grad_() if dora else None
    bias = torch.randn(n, generator=generator).to(dtype).requires_grad_()
    return LoRAPart(weight.to(dtype), a.requires_grad_(), b.requires_grad_(), bias, magnitude, scaling=1.5)


def one_by_one(x: Tensor, gate: LoRAPart, up: LoRAPart, down: LoRAPart, dropout_p: float) -> Tensor:
    def op(x: Tensor, part: LoRAPart, seed: int) -> Tensor:
        w, a, b, bias, m, _, s = part
        options: Any = {"scaling": s, "dropout_p": dropout_p, "dropout_seed": seed, "backend": "triton"}
        return (
            lk.lora_linear(x, w, a, b, bias, **options) if m is None else lk.dora_linear(x, w, a, b, m, bias, **options)
        )

    return op(torch.nn.functional.silu(op(x, gate, 3)) * op(x, up, 3), down, 4)


@pytest.mark.parametrize(
    ("dtype", "dora", "dropout_p"),
    [(torch.float32, False, 0.3), (torch.float32, True, 0.0), (torch.float16, False, 0.0), (torch.float16, True, 0.3)],
    ids=str,
)
def test_an_mlp_is_its_parts(dtype: torch.dtype, dora: bool, dropout_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = ((F, K, 4), (F, K, 7), (N, F, 1))
    parts = [part(*size, dtype, generator, dora=dora) for size in sizes]
    x = torch.randn(M, K, generator=generator).to(dtype).requires_grad_()
    operands = [x, *(t for p in parts for t in p[1:5] if t is not None)]
    block = lk.mlp_lora(x, *parts, dropout_p=dropout_p, dropout_seed=3, backend="triton")
    separate = one_by_one(x, *parts, dropout_p)
    dy = torch.randn(M, N, generator=generator).to(dtype)
    ours, theirs = (torch.autograd.grad(y, operands, dy) for y in (block, separate))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for mine, other in zip([block, *ours], [separate, *theirs], strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
