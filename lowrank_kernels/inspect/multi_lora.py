"""The multi-adapter linear, as the tools see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import functional
from ..kernels import multi_lora as launchers
from ..kernels.multi_lora_tiles import (
    AdapterRows,
    choose_multi_strategy,
    multi_lora_main_tiles,
    multi_lora_seconds,
    multi_lora_tiles,
    tile_capacity,
)
from ..kernels.target import Target
from ..stack import LoRAStack, Place
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F32 = torch.bfloat16, torch.float32
_DTYPES = {"bf16": (_BF16, _BF16), "bf16/f32": (_BF16, _F32), "f32": (_F32, _F32)}


def _case(
    M: int, R: int, dtypes: str, *, dora: bool = False, weighted: bool = False, dropout: bool = False
) -> LaunchCase:
    """The kernels on a batch of 64 adapters of rank R, as forward and backward launch them."""
    dtype, factor_dtype = _DTYPES[dtypes]

    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        width, adapters = 4096, 64
        i32 = torch.int32
        table, scalings, order = empty(adapters, 3, of=i32), empty(adapters, of=_F32), empty(M, of=i32)
        bounds, tiles = empty(adapters + 2, of=i32), empty(tile_capacity(M, adapters), 3, of=i32)
        x, factor = empty(M, width), empty(adapters * R, width, of=factor_dtype)
        weights = empty(M, of=_F32) if weighted else None
        p, seed = (empty(adapters, of=torch.float64), empty(of=torch.int64)) if dropout else (None, None)
        scale, bias, out = (empty(adapters, width, of=_F32), empty(width), empty(M, width)) if dora else (None,) * 3
        choice = multi_lora_tiles(target, tiles.shape[0], width, R, dtype)
        rows = AdapterRows(table, scalings, order, bounds, tiles, weights, p, seed)
        down = launchers.multi_lora_down(x, factor, rows, R, choice)
        launchers.multi_lora_up_(x, down, factor, rows, choice, column_scale=scale, bias=bias, out=out)
        launchers.multi_lora_linear_fwd(
            x,
            empty(width, width),
            down,
            factor,
            rows,
            empty(M, of=i32),
            empty(M, width),
            multi_lora_main_tiles(target, M, dtype),
            column_scale=scale,
            bias=bias,
            u=out,
        )
        grad = replace(choice, splits=1)
        launchers.multi_lora_grad(x, down[0], rows, factor.shape[0], factor_dtype, grad)

    words = [f"multi M={M} R={R} {dtypes}"]
    words += [word for word, on in (("dora", dora), ("weighted", weighted), ("dropout", dropout)) if on]
    return LaunchCase(" ".join(words), run)


def _cases() -> Iterator[LaunchCase]:
    for dtypes in _DTYPES:
        for M in (1, 64, 2048):
            for R in (16, 64):
                yield _case(M, R, dtypes)
        yield _case(2048, 16, dtypes, dropout=True)
    yield _case(2048, 64, "bf16", dropout=True)
    yield _case(64, 16, "bf16", dora=True)
    yield _case(64, 16, "bf16", weighted=True)
    yield _case(512, 16, "bf16", dora=True)
    yield _case(512, 16, "bf16", weighted=True)


_PLACES = (Place(0, 8, 2.0), Place(8, 3, 0.5), Place(11, 16, 1.0))


def _traced_tensors(dtype: torch.dtype, factor_dtype: torch.dtype) -> object:
    def tensors(device: str) -> tuple[Tensor, ...]:
        x = torch.randn(48, 64, dtype=dtype, device=device, requires_grad=True)
        weight = torch.randn(40, 64, dtype=dtype, device=device)
        lora_a = torch.randn(27, 64, dtype=factor_dtype, device=device, requires_grad=True)
        lora_b = torch.randn(27, 40, dtype=factor_dtype, device=device, requires_grad=True)
        bias = torch.randn(40, dtype=dtype, device=device, requires_grad=True)
        magnitude = torch.rand(1, 40, dtype=factor_dtype, device=device, requires_grad=True)
        ids = torch.arange(48, device=device) % 4 - 1
        seed = torch.full((), 7, dtype=torch.int64, device=device)
        return x, weight, lora_a, lora_b, ids, bias, magnitude, seed

    return tensors


def _plain(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return functional.multi_lora_linear(x, weight, LoRAStack(lora_a, lora_b, _PLACES), ids)


def _sliced(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """Two slices of 24 and 16 columns; of the second, the second adapter has nothing."""
    places = [p._replace(slices=((p.rank, 1.0), (p.rank * (i != 1), 0.5))) for i, p in enumerate(_PLACES)]
    stack = LoRAStack(torch.stack([lora_a, lora_a + 1]), lora_b, places, slices=(24, 16))
    return functional.multi_lora_linear(x, weight, stack, ids)


def _experts(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    """Three experts, one of which has the rows that have no adapter above, too."""
    rows = functional.plan_experts(ids.clamp(min=0), 3)
    weights = torch.stack([weight, weight + 1, weight - 1])
    return functional.experts_linear(x, weights, LoRAStack(lora_a, lora_b, _PLACES), rows)


def _with_everything(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    bias: Tensor,
    magnitude: Tensor,
    seed: Tensor,
) -> Tensor:
    places = (_PLACES[0], _PLACES[1]._replace(magnitude=0), _PLACES[2])
    stack = LoRAStack(lora_a, lora_b, places, magnitude)
    return functional.multi_lora_linear(x, weight, stack, ids, bias, dropout_p=(0.0, 0.1, 0.2), dropout_seed=seed)


def _choices(target: Target) -> Iterator[tuple[str, str]]:
    K = N = 4096
    for M, adapters in ((1, 1), (16, 16), (64, 64), (512, 8), (2048, 8)):
        for R in (16, 64):
            seconds = multi_lora_seconds(target, M, K, N, R, adapters, _BF16)
            choice = choose_multi_strategy(target, M, K, N, R, adapters, _BF16)
            words = ", ".join(f"{strategy} {1e6 * s:.0f} µs" for strategy, s in seconds.items())
            yield f"M={M}, {adapters} adapters, K=N={K}, R={R}, bfloat16", f"{choice}: {words}"


FAMILY = OpFamily(
    name="multi_lora",
    cases=_cases,
    choices=_choices,
    work={
        "_multi_lora_down_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["C"] * a["max_rank"]),
        "_multi_lora_up_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["C"] * a["max_rank"], in_place=("y_ptr",)),
        "_multi_lora_linear_fwd_kernel": KernelWork(
            lambda a: 2.0 * a["M"] * a["N"] * (a["K"] + a["max_rank"]), main=True
        ),
        "_multi_lora_grad_kernel": KernelWork(lambda a: 2.0 * a["big_ptr"].shape[0] * a["C"] * a["small_ptr"].shape[1]),
    },
    traced=(
        Traced("bfloat16", _plain, _traced_tensors(_BF16, _BF16)),  # type: ignore[arg-type]
        Traced("slices", _sliced, _traced_tensors(_BF16, _BF16)),  # type: ignore[arg-type]
        Traced("experts", _experts, _traced_tensors(_BF16, _BF16)),  # type: ignore[arg-type]
        Traced("a DoRA adapter, bias, dropout each", _with_everything, _traced_tensors(_BF16, _F32)),  # type: ignore[arg-type]
    ),
)
