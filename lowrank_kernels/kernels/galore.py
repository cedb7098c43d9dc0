"""Triton kernels of a GaLore step: the projection with Adam on it, and W."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .target import Target
from .tiles import dot, load_tile, store_tile


@triton.jit
def _galore_project_kernel(
    g_ptr,
    p_ptr,
    m_ptr,
    v_ptr,
    change_ptr,
    N,
    K,
    R,
    stride_gn,
    stride_gk,
    stride_pn,
    stride_pr,
    stride_mr,
    stride_mk,
    stride_vr,
    stride_vk,
    rate,
    beta1,
    beta2,
    eps,
    inverse_root,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A (BLOCK_R, BLOCK_K) tile of L = Pᵀ G a program, which stays in registers: m, v, and rate · m / (√v / root + ε).

    All in float32. ``change`` is (R, K), contiguous. Grid: (cdiv(K, BLOCK_K), cdiv(R, BLOCK_R)).
    """
    k0 = tl.program_id(0) * BLOCK_K
    r0 = tl.program_id(1) * BLOCK_R
    low = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for n0 in range(0, N, BLOCK_N):
        p = load_tile(p_ptr, r0, n0, R, N, stride_pr, stride_pn, BLOCK_R, BLOCK_N, False).to(tl.float32)
        g = load_tile(g_ptr, n0, k0, N, K, stride_gn, stride_gk, BLOCK_N, BLOCK_K, False).to(tl.float32)
        low = dot(p, g, low, PRECISION)
    m = load_tile(m_ptr, r0, k0, R, K, stride_mr, stride_mk, BLOCK_R, BLOCK_K, False)
    v = load_tile(v_ptr, r0, k0, R, K, stride_vr, stride_vk, BLOCK_R, BLOCK_K, False)
    m = beta1 * m + (1.0 - beta1) * low
    v = beta2 * v + (1.0 - beta2) * low * low
    store_tile(m_ptr, m, r0, k0, R, K, stride_mr, stride_mk, BLOCK_R, BLOCK_K, False)
    store_tile(v_ptr, v, r0, k0, R, K, stride_vr, stride_vk, BLOCK_R, BLOCK_K, False)
    change = rate * m / (tl.sqrt(v) * inverse_root + eps)
    store_tile(change_ptr, change, r0, k0, R, K, K, 1, BLOCK_R, BLOCK_K, False)


@triton.jit
def _galore_write_kernel(
    w_ptr,
    p_ptr,
    change_ptr,
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_pn,
    stride_pr,
    keep,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W ← keep · W - P change, a (BLOCK_N, BLOCK_K) tile a program: read once, written once, rounded once.

    Grid: (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K)).
    """
    n0 = tl.program_id(0) * BLOCK_N
    k0 = tl.program_id(1) * BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        p = load_tile(p_ptr, n0, r0, N, R, stride_pn, stride_pr, BLOCK_N, BLOCK_R, False).to(tl.float32)
        change = load_tile(change_ptr, r0, k0, R, K, K, 1, BLOCK_R, BLOCK_K, False)
        acc = dot(p, change, acc, PRECISION)
    w = load_tile(w_ptr, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False).to(tl.float32)
    store_tile(w_ptr, keep * w - acc, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False)


def galore_adam_(
    weight: Tensor,
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    target: Target,
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    keep: float,
    inverse_root: float,
) -> None:
    """Two launches. weight, grad (N, K), basis (N, R), moments (R, K) float32, all of any strides.

    Args:
        rate: lr α / (1 - β₁ᵗ).  keep: 1 - lr λ.  inverse_root: 1 / √(1 - β₂ᵗ).
    """
    (N, K), R = weight.shape, basis.shape[1]
    # Three tf32 products a pair keep float32's digits; without tf32, plain FMA.
    precision = "tf32x3" if target.arch.startswith("sm_") else "ieee"
    change = weight.new_empty(R, K, dtype=torch.float32)
    block_n, block_k = 32, 64
    block_r = 16 if R <= 16 else 32 if R <= 32 else 64
    _galore_project_kernel[(triton.cdiv(K, block_k), triton.cdiv(R, block_r))](
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        change,
        N,
        K,
        R,
        *grad.stride(),
        *basis.stride(),
        *exp_avg.stride(),
        *exp_avg_sq.stride(),
        rate,
        *betas,
        eps,
        inverse_root,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        PRECISION=precision,
        num_warps=8 if block_r == 64 else 4,
        num_stages=3,
    )
    block_n = 64
    _galore_write_kernel[(triton.cdiv(N, block_n), triton.cdiv(K, block_k))](
        weight,
        basis,
        change,
        N,
        K,
        R,
        *weight.stride(),
        *basis.stride(),
        keep,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=16,
        PRECISION=precision,
        num_warps=4,
        num_stages=2,
    )
