"""Many adapters in one batch: the benchmark row, and what there is to tune."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import lowrank_kernels as lk

from ...kernels import roofline
from ...kernels.multi_lora_tiles import choose_multi_strategy, multi_lora_tiles, tile_capacity
from ...kernels.roofline import Work
from ...kernels.target import Target
from .bench import BASES, GPU_WIDTHS, PRODUCT, REFERENCE, Bench, Inputs, Shape, Tunable, normal, shapes_of
from .lora import lora_flops, lora_inputs


def _multi_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    M, K, N, R, G = (s[k] for k in "MKNRG")
    one = lora_inputs(s, dtype, device)
    all_a = normal(G, R, K, dtype=dtype, device=device, scale=K**-0.5)
    all_b = normal(G, N, R, dtype=dtype, device=device, scale=R**-0.5)
    return {
        "x": one["x"],
        "weight": one["weight"],
        "ids": torch.arange(M, device=device) % G,
        "all_a": all_a,
        "all_b": all_b,
        "stack": lk.LoRAStack.from_factors([(a, b, 2.0) for a, b in zip(all_a, all_b, strict=True)]),
    }


def _multi_gathered(i: Inputs) -> Tensor:
    """Copy each row's factors, then two `bmm`."""
    down = torch.bmm(i["all_a"][i["ids"]], i["x"].unsqueeze(2))
    return linear(i["x"], i["weight"]) + 2.0 * torch.bmm(i["all_b"][i["ids"]], down).squeeze(2)


def _multi_loop(i: Inputs) -> Tensor:
    """One adapter after the other, each on its rows: what PEFT's mixed batch does."""
    y = linear(i["x"], i["weight"])
    for adapter in i["ids"].unique().tolist():
        rows = torch.where(i["ids"] == adapter)[0]
        down = linear(i["x"][rows], i["all_a"][adapter])
        y[rows] += (linear(down, i["all_b"][adapter]) * 2.0).to(y.dtype)
    return y


def _multi_bytes(s: Shape, size: int) -> float:
    M, K, N, R, G = (s[k] for k in "MKNRG")
    return size * (M * K + N * K + M * N + min(G, M) * R * (K + N))


def _multi_launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    M, K, N, R, G = (s[k] for k in "MKNRG")
    splits = multi_lora_tiles(target, tile_capacity(M, G), K, R, dtype).splits
    aligned = all(width * dtype.itemsize % 16 == 0 for width in (K, N))
    strategy = choose_multi_strategy(target, M, K, N, R, G, dtype, aligned=aligned)
    launches = roofline.multi_lora_forward(M, K, N, R, G, dtype.itemsize, splits, strategy)
    return f"{strategy.replace('_', ' ')}, {splits} parts", launches


BENCHES = (
    Bench(
        name="multi_lora_linear",
        shapes=shapes_of(
            (64, 2048, 2048, 16, 64),
            (64, 2048, 2048, 16, 8),
            (16, 2048, 2048, 64, 16),
            (256, 1024, 2049, 8, 4),
            names="M K N R G",
        ),
        gpu_shapes=shapes_of(
            *((m, k, n, 16, g) for k, n in GPU_WIDTHS[:4] for m, g in ((1, 1), (16, 16), (64, 64), (2048, 8))),
            names="M K N R G",
        ),
        make=_multi_inputs,
        providers={
            "floor": lambda i: linear(i["x"], i["weight"]),
            "plain": _multi_gathered,
            "peft": _multi_loop,
            "ours": lambda i, backend="auto": lk.multi_lora_linear(
                i["x"], i["weight"], i["stack"], i["ids"], backend=backend
            ),
        },
        exact=_multi_gathered,
        nbytes=_multi_bytes,
        flops=lora_flops,
        launches=_multi_launches,
    ),
)

_OP = "multi_lora_linear"
TUNABLES = {
    "cpu": (Tunable(_OP, _OP, PRODUCT, (*BASES, REFERENCE)),),
    "cuda": (Tunable(_OP, _OP, PRODUCT, ({"strategy": "one_kernel"}, {"strategy": "library"})),),
}
