"""Triton kernels of Sparse Matrix Tuning and their launchers.

dW_b = dY[:, rows of b]ᵀ x[:, columns of b] for a list of blocks b of W, a step of AdamW on those blocks that writes
them into W as well, and that writing alone. Sums are accumulated in float32 and rounded once; parts of a sum over
tokens are added in order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_sparse_tiles import BlockGradTiles
from .launch import ordered_sum, precision
from .tiles import cast, dot, load_tile


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _block_grad_kernel(
    x_ptr, dy_ptr, index_ptr, out_ptr, M, K, N, stride_xm, stride_dym, stride_os, rows_per_split,
    BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_R, BLOCK_C) tile of one block's gradient, over the tokens of one split.

    Grid: (tiles of a block × blocks, splits). Neighbouring programs take neighbouring blocks of the list, which is
    ordered by rows: those that share rows of W read the same columns of dY at about the same time, from L2.
    out is (splits, blocks, BM, BN).
    """
    tiles_c: tl.constexpr = (BN + BLOCK_C - 1) // BLOCK_C
    tiles: tl.constexpr = (BM + BLOCK_R - 1) // BLOCK_R * tiles_c
    block = tl.program_id(0) // tiles
    r0 = tl.program_id(0) % tiles // tiles_c * BLOCK_R
    c0 = tl.program_id(0) % tiles_c * BLOCK_C
    split = tl.program_id(1)
    row = tl.load(index_ptr + 2 * block) * BM
    column = tl.load(index_ptr + 2 * block + 1) * BN
    # What is past the block's edge, or past that of W where the block sticks out of it, reads as zero.
    last_row = min(N, row + BM)
    last_column = min(K, column + BN)
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    first = split * rows_per_split
    last = min(first + rows_per_split, M)
    for m0 in range(first, last, BLOCK_M):
        dy = load_tile(dy_ptr, m0, row + r0, last, last_row, stride_dym, 1, BLOCK_M, BLOCK_R, False)
        x = load_tile(x_ptr, m0, column + c0, last, last_column, stride_xm, 1, BLOCK_M, BLOCK_C, False)
        acc = dot(dy.T, x, acc, PRECISION)
    offs_r = r0 + tl.arange(0, BLOCK_R)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    # A tile can be wider than its block, whose size need not be a power of two.
    mask = (offs_r < BM)[:, None] & (offs_c < BN)[None, :]
    out = out_ptr + split.to(tl.int64) * stride_os + block.to(tl.int64) * (BM * BN)
    tl.store(out + offs_r[:, None] * BN + offs_c[None, :], cast(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _random_words(seed, block, first, COUNT: tl.constexpr):
    """Philox-4x32-10 words of COUNT neighbouring elements of a block, as ``reference/dropout.py`` numbers them."""
    group = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = tl.zeros([COUNT // 4], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, zero + block.to(tl.uint32), zero, zero)
    # join puts its operands last: (w0, w2) and (w1, w3) interleave to w0, w1, w2, w3.
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [COUNT])


@triton.jit
def _stochastic_bfloat16(x, words):
    """float32 x rounded to bfloat16, up where the word's lower half carries into what is kept."""
    bits = (x.to(tl.uint32, bitcast=True) + (words & 0xFFFF)) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _block_adamw_kernel(
    blocks_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, index_ptr, seed_ptr,
    N, K, stride_wn, stride_wk, rate, beta1, beta2, eps, keep, root_correction,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one block: moments and value are updated in place, and the value goes into W.

    Grid: (blocks, cdiv(BM * BN, BLOCK)). The packed tensors are contiguous (blocks, BM, BN); the moments float32.
    rate = lr / (1 - β₁ᵗ), keep = 1 - lr λ, root_correction = √(1 - β₂ᵗ).
    """
    block = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    mask = offs < BM * BN
    at = block.to(tl.int64) * (BM * BN) + offs
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
    p = tl.load(blocks_ptr + at, mask=mask, other=0.0).to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    p = keep * p - rate * m / (tl.sqrt(v) / root_correction + eps)
    tl.store(exp_avg_ptr + at, m, mask=mask)
    tl.store(exp_avg_sq_ptr + at, v, mask=mask)
    if STOCHASTIC:
        value = _stochastic_bfloat16(p, _random_words(tl.load(seed_ptr), block, first, BLOCK))
    else:
        value = cast(p, blocks_ptr.dtype.element_ty)
    tl.store(blocks_ptr + at, value, mask=mask)
    _store_in_weight(weight_ptr, value, index_ptr, block, offs, N, K, stride_wn, stride_wk, BM, BN)


@triton.jit
def _store_in_weight(
    weight_ptr, value, index_ptr, block, offs, N, K, stride_wn, stride_wk, BM: tl.constexpr, BN: tl.constexpr
):
    """Elements ``offs`` of a block to their places in W, rounded to its dtype."""
    row = tl.load(index_ptr + 2 * block).to(tl.int64) * BM + offs // BN
    column = tl.load(index_ptr + 2 * block + 1).to(tl.int64) * BN + offs % BN
    inside = (offs < BM * BN) & (row < N) & (column < K)  # a block may stick out of W
    target: tl.constexpr = weight_ptr.dtype.element_ty
    tl.store(weight_ptr + row * stride_wn + column * stride_wk, cast(value, target), mask=inside)


@triton.jit
def _write_blocks_kernel(
    blocks_ptr,
    weight_ptr,
    index_ptr,
    N,
    K,
    stride_wn,
    stride_wk,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one block into W. Grid: (blocks, cdiv(BM * BN, BLOCK)); blocks contiguous (blocks, BM, BN)."""
    block = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(blocks_ptr + block.to(tl.int64) * (BM * BN) + offs, mask=offs < BM * BN, other=0.0)
    _store_in_weight(weight_ptr, value, index_ptr, block, offs, N, K, stride_wn, stride_wk, BM, BN)


# ---------------------------------------------------------------------------------------------------------- launchers


def block_grad(
    x: Tensor,
    grad_y: Tensor,
    block_index: Tensor,
    block_size: tuple[int, int],
    dtype: torch.dtype,
    tiles: BlockGradTiles,
) -> Tensor:
    """dW_b of every block, (n, bm, bn) in ``dtype``; x (M, K) and grad_y (M, N) with unit column stride.

    One launch, and an ordered sum where tokens are split. block_index (n, 2) int32, contiguous.
    """
    (M, K), N = x.shape, grad_y.shape[1]
    (bm, bn), n = block_size, block_index.shape[0]
    out = x.new_empty(n, bm, bn, dtype=dtype)
    if n == 0 or M == 0:
        return out.zero_()
    t = tiles
    partial = out if t.splits == 1 else x.new_empty(t.splits, n, bm, bn, dtype=torch.float32)
    rows_per_split = triton.cdiv(triton.cdiv(M, t.splits), t.BLOCK_M) * t.BLOCK_M
    per_block = triton.cdiv(bm, t.BLOCK_R) * triton.cdiv(bn, t.BLOCK_C)
    sizes = M, K, N, x.stride(0), grad_y.stride(0), out.numel(), rows_per_split
    blocks = {"BM": bm, "BN": bn, "BLOCK_M": t.BLOCK_M, "BLOCK_R": t.BLOCK_R, "BLOCK_C": t.BLOCK_C}
    options = {"PRECISION": precision(x.dtype), "num_warps": t.num_warps, "num_stages": t.num_stages}
    _block_grad_kernel[(per_block * n, t.splits)](x, grad_y, block_index, partial, *sizes, **blocks, **options)
    return out if t.splits == 1 else ordered_sum(partial, out)


def block_adamw_(
    blocks: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, block_index: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int, seed: Tensor | None,
) -> None:  # fmt: skip
    """One step of AdamW on packed blocks (n, bm, bn), and the blocks into W: one launch. All contiguous but W."""
    n, bm, bn = blocks.shape
    if blocks.numel() == 0:
        return
    block, (beta1, beta2) = 1024, betas
    corrected = lr / (1.0 - beta1**step), beta1, beta2, eps, 1.0 - lr * weight_decay, math.sqrt(1.0 - beta2**step)
    _block_adamw_kernel[(n, triton.cdiv(bm * bn, block))](
        blocks, grad, exp_avg, exp_avg_sq, weight, block_index, seed, *weight.shape, *weight.stride(), *corrected,
        BM=bm, BN=bn, BLOCK=block, STOCHASTIC=seed is not None, num_warps=4,
    )  # fmt: skip


def write_blocks_(weight: Tensor, blocks: Tensor, block_index: Tensor) -> None:
    """W[block] ← blocks, rounded to W's dtype: one launch. weight (N, K) of any strides, the others contiguous."""
    n, bm, bn = blocks.shape
    if blocks.numel() == 0 or weight.numel() == 0:
        return
    block = 1024
    _write_blocks_kernel[(n, triton.cdiv(bm * bn, block))](
        blocks, weight, block_index, *weight.shape, *weight.stride(), BM=bm, BN=bn, BLOCK=block, num_warps=4
    )


__all__ = ["block_adamw_", "block_grad", "write_blocks_"]
