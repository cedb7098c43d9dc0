"""Bytes, FLOPs and launches of each strategy, and the time that a roofline gives them.

A prediction, not a measurement: time = max(bytes / copy ceiling, FLOPs / matrix ceiling) + launches · launch cost, each
launch on its own roof. The ceilings belong to the target (``target.TARGETS``).
"""

from __future__ import annotations

import torch

from .target import Target

LAUNCH_SECONDS = 4e-6
"""Host-side cost of one launch that is not hidden: order of magnitude of a CUDA launch from Python-free code."""
OWN_PRODUCT_EFFICIENCY = 0.80
"""What our main product is assumed to reach of the vendor's where both are bound by arithmetic. An assumption, to be
replaced by `lrk tune`: hand-written Triton products on Hopper are reported between 0.7 and 0.95 of cuBLAS."""


def launch_seconds(target: Target, bytes_moved: float, flops: float, itemsize: int = 2) -> float:
    """Roofline time of one launch; float32 products run at a sixteenth of the half-precision ceiling (FMA units)."""
    peak = target.matrix_flops_per_s / (1 if itemsize == 2 else 16)
    return max(bytes_moved / target.copy_bytes_per_s, flops / peak) + LAUNCH_SECONDS


def lora_forward_seconds(
    target: Target, strategy: str, M: int, K: int, N: int, R: int, dtype: torch.dtype, columns: int
) -> float:
    """Predicted seconds of y = x Wᵀ + s (x Aᵀ) Bᵀ by one strategy ("fused", "two_kernel" or "library").

    ``columns``: how many programs share a row of tiles; with "fused" each of them computes P.
    """
    size = dtype.itemsize
    x, w, y, p, factors = M * K * size, N * K * size, M * N * size, M * R * size, R * (K + N) * size
    main = 2.0 * M * N * K
    down = launch_seconds(target, x + R * K * size + p, 2.0 * M * R * K, size)
    if strategy == "fused":
        return launch_seconds(
            target, x + w + y + p + factors, (main + 2.0 * M * R * (columns * K + N)) / OWN_PRODUCT_EFFICIENCY, size
        )
    if strategy == "two_kernel":
        own = launch_seconds(
            target, x + w + y + p + R * N * size, (main + 2.0 * M * R * N) / OWN_PRODUCT_EFFICIENCY, size
        )
        return down + own
    up = launch_seconds(target, 2 * y + p + R * N * size, 2.0 * M * R * N, size)
    return down + launch_seconds(target, x + w + y, main, size) + up


def multi_lora_forward_seconds(
    target: Target, strategy: str, M: int, K: int, N: int, R: int, adapters: int, dtype: torch.dtype
) -> float:
    """Predicted seconds of the base product and each row's correction, "one_kernel" or "library" with an addition.

    Which rows are whose is not known beforehand: every adapter that can be there is taken to be. In "one_kernel" each
    row multiplies by its own factor, rank by rank, on the units of float32 products.
    """
    size, there = dtype.itemsize, min(M, adapters)
    x, w, y, p, of_b = M * K * size, N * K * size, M * N * size, 4 * M * R, there * R * N * size
    main, up = 2.0 * M * N * K, 2.0 * M * R * N
    if strategy == "one_kernel":
        share = up if size == 4 else 16 * up  # in products at the ceiling that launch_seconds takes
        return launch_seconds(target, x + w + y + p + of_b, main / OWN_PRODUCT_EFFICIENCY + share, size)
    return launch_seconds(target, x + w + y, main, size) + launch_seconds(target, 2 * y + p + of_b, up, size)


__all__ = [
    "LAUNCH_SECONDS",
    "OWN_PRODUCT_EFFICIENCY",
    "launch_seconds",
    "lora_forward_seconds",
    "multi_lora_forward_seconds",
]
