"""The DoRA linear and its norm, as the tools see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..kernels import dora as launchers
from ..kernels.lora_tiles import Strategy, lora_tiles
from ..kernels.target import Target
from .lora import FAMILY as LORA
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F32 = torch.bfloat16, torch.float32


def _linear(
    strategy: Strategy, M: int, R: int, dtype: torch.dtype, dropout_p: float = 0.0, width: int = 4096
) -> LaunchCase:
    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        K = N = width
        options: dict[str, Any] = {"strategy": strategy, "aligned": width % 8 == 0, "scaled": True}
        tiles = lora_tiles(target, M, K, N, R, dtype, dropout_p > 0.0, **options)
        x, weight, lora_a, lora_b = empty(M, K), empty(N, K), empty(R, K, of=_F32), empty(N, R, of=_F32)
        scale, bias = empty(N, of=_F32), empty(N)
        seed = empty(of=torch.int64) if dropout_p else None
        common: dict[str, Any] = {"scaling": 0.5, "dropout_p": dropout_p, "dropout_seed": seed}
        _, p, u = launchers.dora_linear_fwd(x, weight, lora_a, lora_b, scale, tiles, bias=bias, save=True, **common)
        saved: dict[str, Any] = {"norm": scale, "column_scale": scale, "p": p, "u": u}
        launchers.dora_linear_bwd(
            empty(M, N), x, weight, lora_a, lora_b, tiles, needs=(True,) * 4, magnitude_dtype=_F32, **saved, **common
        )

    words = f"dora {strategy} M={M} R={R} {'f32' if dtype == _F32 else 'bf16/f32'}" + (" dropout" if dropout_p else "")
    return LaunchCase(words + (f" width={width}" if width != 4096 else ""), run)


def _norm(R: int, dtype: torch.dtype, cached: bool) -> LaunchCase:
    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = _F32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        sq_norm = empty(4096) if cached else None
        weight, lora_a, lora_b = empty(4096, 4096, of=dtype), empty(R, 4096), empty(4096, R)
        launchers.dora_norm(weight, lora_a, lora_b, 0.5, target, weight_sq_norm=sq_norm, magnitude=empty(4096))

    return LaunchCase(f"dora norm R={R} {'f32' if dtype == _F32 else 'bf16/f32'}" + (" cached" if cached else ""), run)


def _dropout(target: Target) -> None:
    x = torch.empty(2048, 4096, dtype=_BF16, device="meta")
    launchers.dropout(x, 0.1, torch.empty((), dtype=torch.int64, device="meta"), add=torch.empty_like(x))


def _cases() -> Iterator[LaunchCase]:
    strategies: tuple[Strategy, ...] = ("fused", "two_kernel", "library")
    for strategy in strategies:
        yield _linear(strategy, 2048, 16, _BF16)
        yield _linear(strategy, 16, 16, _BF16)
    yield _linear("two_kernel", 2048, 32, _BF16)
    yield _linear("two_kernel", 2048, 64, _BF16, 0.1)
    yield _linear("library", 2048, 16, _BF16, width=4097)
    yield _linear("two_kernel", 2048, 16, _F32)
    for R in (16, 32, 64, 256):
        yield _norm(R, _BF16, cached=False)
    yield _norm(16, _BF16, cached=True)
    yield _norm(16, _F32, cached=False)
    yield LaunchCase("dora dropout of the base", _dropout)


def _norm_flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["N"] * a["K"] * (a["R"] + 2)  # B A, and two sums of squares


def _traced_tensors(device: str) -> tuple[Tensor, ...]:
    x = torch.randn(2, 24, 64, dtype=_BF16, device=device, requires_grad=True)
    weight = torch.randn(48, 64, dtype=_BF16, device=device)
    lora_a = torch.randn(8, 64, device=device, requires_grad=True)
    lora_b = torch.randn(48, 8, device=device, requires_grad=True)
    magnitude = torch.rand(48, device=device, requires_grad=True)
    bias = torch.randn(48, dtype=_BF16, device=device, requires_grad=True)
    seed = torch.full((), 7, dtype=torch.int64, device=device)
    return x, weight, lora_a, lora_b, magnitude, bias, seed


def _plain(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, *_: Tensor) -> Tensor:
    return functional.dora_linear(x, weight, lora_a, lora_b, magnitude, scaling=2.0)


def _with_everything(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor, seed: Tensor
) -> Tensor:
    return functional.dora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        magnitude,
        bias,
        scaling=2.0,
        dropout_p=0.1,
        dropout_seed=seed,
        dropout_base=True,
        detach_norm=False,
    )


FAMILY = OpFamily(
    name="dora",
    cases=_cases,
    work={
        **LORA.work,
        "_dora_norm_kernel": KernelWork(_norm_flops, matrix=False),  # float32 products, whatever the weight's dtype
        "_dropout_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["C"], matrix=False),
    },
    traced=(
        Traced("bfloat16", _plain, _traced_tensors),
        Traced("bias, dropout of the base, full gradients", _with_everything, _traced_tensors),
    ),
)
