"""Triton kernel that merges a low-rank correction into its weight, in place: W ← after ∘ (before ∘ W + s B A)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .target import Target
from .tiles import dot, load_tile, store_tile


@triton.jit
def _random_words(seed, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The 32-bit Philox words of a tile; ``tiles.dropout_keep`` draws the same. col0 and COLS are multiples of 4."""
    group = (col0 // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    row = (row0 + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    zero = tl.zeros([ROWS, COLS // 4], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + group, zero + row, zero, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLS])


@triton.jit
def _merge_lora_kernel(
    w_ptr, a_ptr, b_ptr, before_ptr, after_ptr, seed_ptr,
    N, K, R, stride_wn, stride_wk, stride_ar, stride_bn, scaling,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_N, BLOCK_K) tile of W a program: read once, written once.

    The product is one of float32 factors, whatever their dtype, so that merging loses no digit that they have.
    With a seed, the 16 bits that bfloat16 has not get a random word added, whose carry rounds up
    (``reference/merge.py``). Grid: (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K)).
    """
    n0 = tl.program_id(0) * BLOCK_N
    k0 = tl.program_id(1) * BLOCK_K
    offs_n = n0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        b = load_tile(b_ptr, n0, r0, N, R, stride_bn, 1, BLOCK_N, BLOCK_R, False).to(tl.float32)
        a = load_tile(a_ptr, r0, k0, R, K, stride_ar, 1, BLOCK_R, BLOCK_K, False).to(tl.float32)
        acc = dot(b, a, acc, PRECISION)
    total = load_tile(w_ptr, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False).to(tl.float32)
    if before_ptr is not None:
        total *= tl.load(before_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    total += scaling * acc
    if after_ptr is not None:
        total *= tl.load(after_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    if seed_ptr is not None:
        words = _random_words(tl.load(seed_ptr), n0, k0, BLOCK_N, BLOCK_K)
        bits = (total.to(tl.uint32, bitcast=True) + (words >> 16)) & 0xFFFF0000
        total = tl.where(total == total, bits.to(tl.float32, bitcast=True), total)  # a NaN could carry into infinity
    store_tile(w_ptr, total, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False)


def merge_lora_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    target: Target,
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """One launch. weight (N, K) of any strides; factors with unit column stride; before and after (N,) float32."""
    N, K = weight.shape
    if N == 0 or K == 0:
        return
    # Three tf32 products a pair keep float32's digits; without tf32, plain FMA.
    nvidia = target.arch.startswith("sm_")
    block_n = block_k = 64
    sizes = N, K, lora_a.shape[0], *weight.stride(), lora_a.stride(0), lora_b.stride(0), scaling
    _merge_lora_kernel[(triton.cdiv(N, block_n), triton.cdiv(K, block_k))](
        weight, lora_a, lora_b, before, after, seed, *sizes, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=16,
        PRECISION="tf32x3" if nvidia else "ieee", num_warps=4, num_stages=2,
    )  # fmt: skip
