"""Triton kernel of LoRAPrune's importance: row sums of Î = ((∇B (A - ∇A) + B ∇A) ∘ (W + s B A))²."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .importance_tiles import BLOCK_K, BLOCK_N, ImportanceTiles
from .launch import ordered_sum
from .tiles import dot, load_tile


@triton.jit
def _add_products(
    product,
    update,
    b,
    grad_b,
    a_ptr,
    grad_a_ptr,
    r0,
    k0,
    R,
    K,
    stride_ar,
    stride_ak,
    stride_gar,
    stride_gak,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(B A, ∇B (A - ∇A) + B ∇A) of a tile, with BLOCK_R more ranks."""
    a = load_tile(a_ptr, r0, k0, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False).to(tl.float32)
    grad_a = load_tile(grad_a_ptr, r0, k0, R, K, stride_gar, stride_gak, BLOCK_R, BLOCK_K, False).to(tl.float32)
    update = dot(b, grad_a, update, PRECISION)
    update = dot(grad_b, a - grad_a, update, PRECISION)
    return dot(b, a, product, PRECISION), update


@triton.jit
def _lora_importance_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    grad_a_ptr,
    grad_b_ptr,
    sums_ptr,
    N,
    K,
    R,
    k_per_split,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_gar,
    stride_gak,
    stride_gbn,
    stride_gbr,
    scaling,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N rows of one part of the columns a program: Î is made tile by tile, in registers only, and summed.

    All in float32, products included. Grid: (cdiv(N, BLOCK_N), splits); sums is (splits, N).
    """
    n0 = tl.program_id(0) * BLOCK_N
    first = tl.program_id(1) * k_per_split
    last = min(first + k_per_split, K)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    if WHOLE_RANK:  # R <= BLOCK_R: B and its gradient stay in registers, and the loop over K has no other inside
        b = load_tile(b_ptr, n0, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False).to(tl.float32)
        grad_b = load_tile(grad_b_ptr, n0, 0, N, R, stride_gbn, stride_gbr, BLOCK_N, BLOCK_R, False).to(tl.float32)
    # The number of stages is said here since loads that feed no product are not pipelined otherwise: W's.
    for k0 in tl.range(first, last, BLOCK_K, num_stages=3):
        product = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        update = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        if WHOLE_RANK:
            product, update = _add_products(
                product,
                update,
                b,
                grad_b,
                a_ptr,
                grad_a_ptr,
                0,
                k0,
                R,
                K,
                stride_ar,
                stride_ak,
                stride_gar,
                stride_gak,
                BLOCK_R,
                BLOCK_K,
                PRECISION,
            )
        else:
            for r0 in range(0, R, BLOCK_R):
                b = load_tile(b_ptr, n0, r0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False).to(tl.float32)
                grad_b = load_tile(grad_b_ptr, n0, r0, N, R, stride_gbn, stride_gbr, BLOCK_N, BLOCK_R, False).to(
                    tl.float32
                )
                product, update = _add_products(
                    product,
                    update,
                    b,
                    grad_b,
                    a_ptr,
                    grad_a_ptr,
                    r0,
                    k0,
                    R,
                    K,
                    stride_ar,
                    stride_ak,
                    stride_gar,
                    stride_gak,
                    BLOCK_R,
                    BLOCK_K,
                    PRECISION,
                )
        w = load_tile(w_ptr, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False).to(tl.float32)
        root = update * (w + scaling * product)
        # Past the last column an infinite factor makes NaN of the zeros there.
        total += tl.sum(tl.where((k0 + tl.arange(0, BLOCK_K) < K)[None, :], root * root, 0.0), axis=1)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    tl.store(sums_ptr + tl.program_id(1) * N + offs_n, total, mask=offs_n < N)


def lora_importance(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
    tiles: ImportanceTiles,
) -> Tensor:
    """Row sums (N,) float32. One launch, one read of W (N, K); a second adds up the parts of split columns.

    All operands have any strides. Column sums are those of the rows of Wᵀ, with Bᵀ for A and Aᵀ for B.
    """
    (N, K), R, splits = weight.shape, lora_a.shape[0], tiles.splits
    sums = weight.new_empty(N, dtype=torch.float32)
    partial = sums if splits == 1 else weight.new_empty(splits, N, dtype=torch.float32)
    k_per_split = triton.cdiv(triton.cdiv(K, splits), BLOCK_K) * BLOCK_K
    operands = weight, lora_a, lora_b, grad_a, grad_b
    strides = [stride for operand in operands for stride in operand.stride()]
    # Three tf32 products a pair keep the digits of float32; without tf32, plain FMA.
    nvidia = tiles.arch.startswith("sm_")
    block_r = 32 if nvidia and 16 < R <= 32 else 16
    options = {"maxnreg": 255} if nvidia else {}
    _lora_importance_kernel[(triton.cdiv(N, BLOCK_N), splits)](
        *operands,
        partial,
        N,
        K,
        R,
        k_per_split,
        *strides,
        scaling,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        BLOCK_R=block_r,
        WHOLE_RANK=R <= block_r,
        PRECISION="tf32x3" if nvidia else "ieee",
        num_warps=8,
        num_stages=3,
        **options,
    )
    return sums if splits == 1 else ordered_sum(partial, sums)
