"""Bytes, FLOPs and launches of each op's forward by Triton, and the time that a roofline gives them.

A prediction, not a measurement: time = max(bytes / copy ceiling, FLOPs / matrix ceiling) + launches · launch cost, each
launch on its own roof. The ceilings belong to the target (``target.TARGETS``). Bytes are the distinct ones of a launch;
that they are what the kernels move is tested in the interpreter (tests/interpreter/test_bench_bytes.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .target import Target

LAUNCH_SECONDS = 4e-6
"""Host-side cost of one launch that is not hidden: order of magnitude of a CUDA launch from Python-free code."""
OWN_PRODUCT_EFFICIENCY = 0.80
"""What our main product is assumed to reach of the vendor's where both are bound by arithmetic. An assumption, to be
replaced by `lrk tune`: hand-written Triton products on Hopper are reported between 0.7 and 0.95 of cuBLAS."""


class Work(NamedTuple):
    """One launch: distinct bytes, FLOPs (our main product's over its assumed efficiency), bytes of an element."""

    nbytes: float
    flops: float
    itemsize: int = 2


def launch_seconds(target: Target, bytes_moved: float, flops: float, itemsize: int = 2) -> float:
    """Roofline time of one launch; float32 products run at a sixteenth of the half-precision ceiling (FMA units)."""
    peak = target.matrix_flops_per_s / (1 if itemsize == 2 else 16)
    return max(bytes_moved / target.copy_bytes_per_s, flops / peak) + LAUNCH_SECONDS


def seconds(target: Target, launches: Iterable[Work]) -> float:
    """Roofline time of launches, one after the other."""
    return sum(launch_seconds(target, *launch) for launch in launches)


def lora_forward(
    strategy: str,
    M: int,
    K: int,
    N: int,
    R: int,
    size: int,
    columns: int = 1,
    *,
    store_p: bool = True,
    scaled: bool = False,
    weight_bytes: float | None = None,
) -> tuple[Work, ...]:
    """Launches of y = x Wᵀ + s (x Aᵀ) Bᵀ by one strategy ("fused", "two_kernel" or "library").

    Args:
        size: bytes of an element, of the factors too.
        columns: how many programs share a row of tiles; with "fused" each of them computes P.
        store_p: "fused" writes P, for backward; the others always do.
        scaled: columns are multiplied by a float32 vector (DoRA).
        weight_bytes: of W, where it is stored in few bits.
    """
    x, w, y, p, a, b = (size * n for n in (M * K, N * K, M * N, M * R, R * K, R * N))
    w = w if weight_bytes is None else weight_bytes
    scale, main = 4 * N * scaled, 2.0 * M * N * K
    if strategy == "fused":
        flops = (main + 2.0 * M * R * (columns * K + N)) / OWN_PRODUCT_EFFICIENCY
        return (Work(x + w + y + p * store_p + a + b + scale, flops, size),)
    down = Work(x + a + p, 2.0 * M * R * K, size)
    if strategy == "two_kernel":
        return down, Work(x + w + y + p + b + scale, (main + 2.0 * M * R * N) / OWN_PRODUCT_EFFICIENCY, size)
    return down, Work(x + w + y, main, size), Work(2 * y + p + b + scale, 2.0 * M * R * N, size)


def lora_forward_seconds(
    target: Target, strategy: str, M: int, K: int, N: int, R: int, dtype: torch.dtype, columns: int
) -> float:
    """Predicted seconds of :func:`lora_forward`."""
    return seconds(target, lora_forward(strategy, M, K, N, R, dtype.itemsize, columns))


def dora_weight_norm(K: int, N: int, R: int, size: int) -> tuple[Work, ...]:
    """One pass over W, in which the tiles of W + s B A are formed and squared; n and ‖W‖² of N rows are written."""
    # Three products of reduced precision a pair, on matrix units at half the rate of half precision.
    return (Work(size * (N * K + R * (K + N)) + 8 * N, 2 * 3 * 2.0 * N * R * K + 4.0 * N * K),)


def merge_lora(K: int, N: int, R: int, size: int) -> tuple[Work, ...]:
    """W read and written, in one launch."""
    return (Work(size * (2 * N * K + R * (K + N)), 2.0 * N * K * R, size),)


def galore_adam(K: int, N: int, R: int, size: int) -> tuple[Work, ...]:
    """G and the moments, then W: the step of R rows is written between the two launches, in float32."""
    # Products of float32, each as three of reduced precision, on matrix units at half the rate of half precision.
    flops = 2 * 3 * 2.0 * N * K * R
    projected = Work(size * N * K + 4 * R * (N + 5 * K), flops)
    return projected, Work(size * 2 * N * K + 4 * R * (N + K), flops)


def lora_importance(K: int, N: int, R: int, size: int, splits: int = 1) -> tuple[Work, ...]:
    """Row sums in one pass over W; with ``splits`` parts of the columns, a launch adds up their float32 sums."""
    # Three products of rank R, each as three of reduced precision, on matrix units at half the rate of half precision.
    flops = 2 * 3 * 6.0 * N * R * K + 4.0 * N * K
    made = Work(size * (N * K + 2 * R * (K + N)) + 4 * splits * N, flops)
    return (made,) if splits == 1 else (made, Work(4 * (splits + 1) * N, 1.0 * splits * N, 4))


def magnitude_histogram(target: Target, elements: int, size: int) -> tuple[Work, ...]:
    """The values once and the counts of each program; a library's sum adds those up."""
    blocks = -(-elements // 4096)
    programs = min(blocks, 4 * target.num_sms)
    counts = 4.0 * 4096 * programs
    return Work(size * elements + counts, 4.0 * elements, 4), Work(counts + 8 * 4096, 4096.0 * programs, 4)


def block_sparse_weight_grad(
    M: int, blocks: int, block: int, size: int, distinct: tuple[int, int], splits: int = 1
) -> tuple[Work, ...]:
    """The chosen columns of dY and x once (``distinct``: row and column blocks), the blocks, and their index.

    With tokens in ``splits`` parts, each part's blocks are written in float32, and added up by a launch of its own.
    """
    flops, result = 2.0 * M * blocks * block**2, blocks * block**2
    read = size * M * block * sum(distinct) + 8 * blocks
    if splits == 1:
        return (Work(read + size * result, flops, size),)
    return Work(read + 4 * splits * result, flops, size), Work((4 * splits + size) * result, 1.0 * splits * result, 4)


def svft_forward(M: int, K: int, N: int, E: int, size: int) -> tuple[Work, ...]:
    """x Vᵀ, the sparse M on it, x Wᵀ, and the sum in place with U; all r = min(N, K) singular vectors, E values."""
    r = min(N, K)
    x, t, y, pattern = size * M * K, size * M * r, size * M * N, 4 * (2 * E + r + 1)
    return (
        Work(x + size * r * K + t, 2.0 * M * K * r, size),
        Work(2 * t + pattern, 2.0 * M * E, 4),
        Work(x + size * N * K + y, 2.0 * M * N * K, size),
        Work(2 * y + t + size * N * r, 2.0 * M * N * r, size),
    )


def multi_lora_forward(
    M: int, K: int, N: int, R: int, G: int, size: int, splits: int = 1, strategy: str = "library"
) -> tuple[Work, ...]:
    """The base product, P set to zero, the down-projection into it, and the sum; a row has one adapter.

    The sum is in place of a library's product ("library"), or in the accumulator of ours ("one_kernel"), where each row
    multiplies by its own factor, rank by rank, on the units of float32 products. Without the plan: a few integers a
    row. Which rows are whose is not known beforehand: every adapter that can be there is taken to be.
    """
    x, w, y, p, a, b = (
        size * M * K,
        size * N * K,
        size * M * N,
        4 * splits * M * R,
        min(G, M) * R * K * size,
        min(G, M) * R * N * size,
    )
    main, up = 2.0 * M * N * K, 2.0 * M * R * N
    down = Work(p, 0.0, 4), Work(x + a + p, 2.0 * M * R * K, size)
    if strategy == "one_kernel":
        share = up if size == 4 else 16 * up  # in products at the ceiling that launch_seconds takes
        return *down, Work(x + w + y + p + b, main / OWN_PRODUCT_EFFICIENCY + share, size)
    return Work(x + w + y, main, size), *down, Work(2 * y + p + b, up, size)


__all__ = [
    "LAUNCH_SECONDS", "OWN_PRODUCT_EFFICIENCY", "Work", "block_sparse_weight_grad", "dora_weight_norm",
    "launch_seconds", "lora_forward", "lora_forward_seconds", "lora_importance", "magnitude_histogram", "merge_lora",
    "multi_lora_forward", "seconds", "svft_forward",
]  # fmt: skip
