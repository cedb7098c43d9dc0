"""The LoRA linear: its benchmark row, and what there is to tune."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import lowrank_kernels as lk

from ...kernels import roofline
from ...kernels.lora_tiles import coded_strategy, lora_tiles
from ...kernels.roofline import Work
from ...kernels.target import Target
from ...weights import NF4Weight
from .bench import (
    BASES,
    CPU_LINEAR,
    EAGER,
    GPU_LINEAR,
    PRODUCT,
    REFERENCE,
    Bench,
    Inputs,
    Shape,
    Tunable,
    normal,
    strategies,
)


def lora_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    M, K, N, R = (s[k] for k in "MKNR")
    return {
        "x": normal(M, K, dtype=dtype, device=device),
        "weight": normal(N, K, dtype=dtype, device=device, scale=K**-0.5),
        "lora_a": normal(R, K, dtype=dtype, device=device, scale=K**-0.5),
        "lora_b": normal(N, R, dtype=dtype, device=device, scale=R**-0.5),
    }


def lora_plain(i: Inputs) -> Tensor:
    return linear(i["x"], i["weight"]) + 2.0 * linear(linear(i["x"], i["lora_a"]), i["lora_b"])


def _lora_peft(i: Inputs) -> Tensor:
    """The sequence of calls that PEFT's LoRA Linear makes."""
    result = linear(i["x"], i["weight"])
    dropped = i["x"].to(i["lora_a"].dtype)
    return (result + linear(linear(dropped, i["lora_a"]), i["lora_b"]) * 2.0).to(i["x"].dtype)


def lora_bytes(s: Shape, size: int) -> float:
    M, K, N, R = (s[k] for k in "MKNR")
    return size * (M * K + N * K + M * N + R * (K + N))


def lora_flops(s: Shape) -> float:
    M, K, N, R = (s[k] for k in "MKNR")
    return 2.0 * M * (N * K + R * (K + N))


def lora_launches(target: Target, s: Shape, dtype: torch.dtype, scaled: bool = False) -> tuple[str, tuple[Work, ...]]:
    M, K, N, R = (s[k] for k in "MKNR")
    tiles = lora_tiles(target, M, K, N, R, dtype, False, scaled=scaled)
    launches = roofline.lora_forward(
        tiles.strategy, M, K, N, R, dtype.itemsize, -(-N // tiles.main.BLOCK_N), store_p=False, scaled=scaled
    )
    return tiles.strategy, launches


# The same over a weight of 4 bits, which the others write out dense first.


def _nf4_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = lora_inputs(s, dtype, device)
    stored = NF4Weight.from_dense(made["weight"])
    return {**made, "weight": stored.dense(), "stored": stored}


def _nf4_weight_bytes(s: Shape) -> float:
    return s["N"] * s["K"] / 2 + 4 * -(-s["N"] * s["K"] // 64) + 64


def _nf4_plain(i: Inputs) -> Tensor:
    return lora_plain({**i, "weight": i["stored"].dense()})


def _nf4_launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    M, K, N, R = (s[k] for k in "MKNR")
    strategy = coded_strategy(target, M, R, dtype, False)
    sizes = M, K, N, R, dtype.itemsize, -(-N // 64)
    return strategy, roofline.lora_forward(strategy, *sizes, store_p=False, weight_bytes=_nf4_weight_bytes(s))


BENCHES = (
    Bench(
        name="lora_linear",
        shapes=CPU_LINEAR,
        gpu_shapes=GPU_LINEAR,
        make=lora_inputs,
        providers={
            "floor": lambda i: linear(i["x"], i["weight"]),
            "plain": lora_plain,
            "peft": _lora_peft,
            "ours": lambda i, backend="auto": lk.lora_linear(
                i["x"], i["weight"], i["lora_a"], i["lora_b"], scaling=2.0, backend=backend
            ),
        },
        exact=lora_plain,
        nbytes=lora_bytes,
        flops=lora_flops,
        launches=lora_launches,
        trained=("x", "lora_a", "lora_b"),
    ),
    Bench(
        name="lora_linear_nf4",
        shapes=CPU_LINEAR[:1],
        gpu_shapes=GPU_LINEAR,
        make=_nf4_inputs,
        providers={
            "floor": lambda i: linear(i["x"], i["weight"]),
            "plain": _nf4_plain,
            "ours": lambda i, backend="auto": lk.lora_linear(
                i["x"], i["stored"], i["lora_a"], i["lora_b"], scaling=2.0, backend=backend
            ),
        },
        exact=lora_plain,
        nbytes=lambda s, size: lora_bytes(s, size) - size * s["N"] * s["K"] + _nf4_weight_bytes(s),
        flops=lora_flops,
        launches=_nf4_launches,
        trained=("x", "lora_a", "lora_b"),
    ),
)

TUNABLES = {
    "cpu": (
        Tunable("lora_linear", "lora_linear", PRODUCT, (*BASES, REFERENCE, EAGER)),
        Tunable("lora_linear_backward", "lora_linear", PRODUCT, (*BASES, EAGER), training=True),
    ),
    "cuda": (
        Tunable("lora_linear", "lora_linear", (*PRODUCT, "R"), (*strategies("fused", "two_kernel"), EAGER)),
        Tunable(
            "lora_linear_backward", "lora_linear", (*PRODUCT, "R"), (*strategies("two_kernel"), EAGER), training=True
        ),
    ),
}
