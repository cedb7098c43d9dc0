"""Triton kernel of the DoRA norm, and the launchers of the DoRA linear.

y = g ∘ u + bias,  u = x Wᵀ + s P Bᵀ,  g = m / n,  n_i = ‖W_i + s B_i A‖

The products are those of the LoRA linear (``kernels/lora.py``) with a column scale in the epilogue.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dropout_arguments
from .lora import base_grad_product, lora_bwd_q_grad_b, lora_grad, lora_linear_bwd_dx, lora_linear_fwd
from .lora_tiles import LoRATiles
from .target import Target
from .tiles import dot, dropout_keep, load_tile, store_tile


@triton.jit
def _dora_norm_kernel(
    w_ptr, a_ptr, b_ptr, sq_in_ptr, magnitude_ptr, norm_ptr, sq_out_ptr, scale_ptr,
    N, K, R, stride_wn, stride_wk, stride_ar, stride_bn, scaling,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of V = W + s B A a program, made and summed in squares tile by tile: V is in registers only.

    W Aᵀ and A Aᵀ would cost as many products, would read W again for ranks beyond a block, and would lose the digits
    that their terms cancel. All in float32, products included. Grid: (cdiv(N, BLOCK_N),).
    """
    n0 = tl.program_id(0) * BLOCK_N
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    sq = tl.zeros([BLOCK_N], dtype=tl.float32)
    if WHOLE_RANK:  # R <= BLOCK_R: B stays in registers, and the loop over K has no other inside
        b = scaling * load_tile(b_ptr, n0, 0, N, R, stride_bn, 1, BLOCK_N, BLOCK_R, False).to(tl.float32)
    # The number of stages is said here since loads that feed no product are not pipelined otherwise: W's.
    for k0 in tl.range(0, K, BLOCK_K, num_stages=3):
        v = load_tile(w_ptr, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False).to(tl.float32)
        if sq_in_ptr is None:
            sq += tl.sum(v * v, axis=1)
        if WHOLE_RANK:
            a = load_tile(a_ptr, 0, k0, R, K, stride_ar, 1, BLOCK_R, BLOCK_K, False).to(tl.float32)
            v = dot(b, a, v, PRECISION)
        else:
            for r0 in range(0, R, BLOCK_R):
                b = scaling * load_tile(b_ptr, n0, r0, N, R, stride_bn, 1, BLOCK_N, BLOCK_R, False).to(tl.float32)
                a = load_tile(a_ptr, r0, k0, R, K, stride_ar, 1, BLOCK_R, BLOCK_K, False).to(tl.float32)
                v = dot(b, a, v, PRECISION)
        total += tl.sum(v * v, axis=1)
    if sq_in_ptr is not None:
        sq = tl.load(sq_in_ptr + offs_n, mask=mask_n, other=0.0)
    tl.store(sq_out_ptr + offs_n, sq, mask=mask_n)
    norm = tl.sqrt(total)
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    if magnitude_ptr is not None:
        m = tl.load(magnitude_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(scale_ptr + offs_n, tl.where(norm == 0.0, 0.0, m / tl.where(norm == 0.0, 1.0, norm)), mask=mask_n)


@triton.jit(do_not_specialize=["M", "threshold_bits"])
def _dropout_kernel(
    x_ptr, add_ptr, seed_ptr, out_ptr, M, C, stride_xm, threshold_bits, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = drop(x) + add, tile by tile; x (M, C), add and out contiguous.

    Grid: (cdiv(M, BLOCK_M), cdiv(C, BLOCK_C)).
    """
    m0 = tl.program_id(0) * BLOCK_M
    c0 = tl.program_id(1) * BLOCK_C
    x = load_tile(x_ptr, m0, c0, M, C, stride_xm, 1, BLOCK_M, BLOCK_C, False).to(tl.float32)
    keep = dropout_keep(tl.load(seed_ptr), m0, c0, threshold_bits, BLOCK_M, BLOCK_C)
    out = tl.where(keep, x * keep_scale, 0.0)
    if add_ptr is not None:
        out += load_tile(add_ptr, m0, c0, M, C, C, 1, BLOCK_M, BLOCK_C, False).to(tl.float32)
    store_tile(out_ptr, out, m0, c0, M, C, C, 1, BLOCK_M, BLOCK_C, False)


def dropout(x: Tensor, dropout_p: float, dropout_seed: Tensor, add: Tensor | None = None) -> Tensor:
    """drop(x) (M, C), added to ``add`` where there is one, in x's dtype."""
    M, C = x.shape
    out = x.new_empty(M, C)
    seed, *keep = dropout_arguments(dropout_p, dropout_seed)
    if out.numel():
        _dropout_kernel[(triton.cdiv(M, 32), triton.cdiv(C, 128))](
            x, add, seed, out, M, C, x.stride(0), *keep, BLOCK_M=32, BLOCK_C=128, num_warps=4
        )
    return out


def dora_norm(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    target: Target,
    *,
    weight_sq_norm: Tensor | None,
    magnitude: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, ‖W_i‖², g), each (N,) float32; g is empty without a magnitude. One launch, one read of W."""
    N, K = weight.shape
    R = lora_a.shape[0]
    norm, sq_norm = (weight.new_empty(N, dtype=torch.float32) for _ in range(2))
    scale = weight.new_empty(0 if magnitude is None else N, dtype=torch.float32)
    if N == 0:
        return norm, sq_norm, scale
    # Three tf32 products a pair keep the digits of float32; without tf32, plain FMA.
    nvidia = target.arch.startswith("sm_")
    options = {"maxnreg": 255} if nvidia else {}
    block_n, block_r = 32, 32 if R > 64 else max(16, triton.next_power_of_2(R))
    blocks = {"BLOCK_N": block_n, "BLOCK_K": 64, "BLOCK_R": block_r, "WHOLE_RANK": R <= block_r}
    strides = *weight.stride(), lora_a.stride(0), lora_b.stride(0)
    _dora_norm_kernel[(triton.cdiv(N, block_n),)](
        weight, lora_a, lora_b, weight_sq_norm, magnitude, norm, sq_norm, scale, N, K, R, *strides, scaling,
        **blocks, PRECISION="tf32x3" if nvidia else "ieee", num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    return norm, sq_norm, scale


def dora_linear_fwd(
    x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, column_scale: Tensor, tiles: LoRATiles, *,
    scaling: float, save: bool, bias: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y = g ∘ u + bias (M, N), P (M, R), u (M, N), all in x's dtype; P and u are empty unless ``save``."""
    u = x.new_empty(x.shape[0], weight.shape[0]) if save else None
    y, p = lora_linear_fwd(
        x, weight, lora_a, lora_b, tiles, scaling=scaling, store_p=save, bias=bias,
        dropout_p=dropout_p, dropout_seed=dropout_seed, column_scale=column_scale, u=u,
    )  # fmt: skip
    empty = x.new_empty(0)
    return y, empty if p is None else p, empty if u is None else u


def dora_linear_bwd(
    grad_y: Tensor, x: Tensor | None, weight: Any, lora_a: Tensor, lora_b: Tensor, tiles: LoRATiles, *,
    norm: Tensor, column_scale: Tensor, p: Tensor | None, u: Tensor | None, scaling: float,
    needs: tuple[bool, ...], magnitude_dtype: torch.dtype, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None, dropout_base: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dX, dA, dB, dm = Σ_m dY ∘ u / n), each None unless in ``needs``.

    ``dropout_base``: dX = dY W + drop'((g ∘ dY - dY) W + s Q A).
    """
    M, N = grad_y.shape
    R, K = lora_a.shape
    need_x, need_a, need_b, need_m = needs
    if M == 0:
        return (
            grad_y.new_zeros(0, K) if need_x else None,
            torch.zeros_like(lora_a) if need_a else None,
            torch.zeros_like(lora_b) if need_b else None,
            grad_y.new_zeros(N, dtype=magnitude_dtype) if need_m else None,
        )
    if p is None:
        p = grad_y.new_zeros(M, R)  # dB is not wanted; its share of the one pass is wasted, and small
    grad_u = torch.empty_like(grad_y) if need_x and (dropout_base or tiles.strategy == "library") else None
    grad_m = grad_y.new_empty(N, dtype=magnitude_dtype) if need_m else None
    of_dora = {"column_scale": column_scale, "grad_u": grad_u}
    dropped = {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
    q, grad_b = lora_bwd_q_grad_b(grad_y, lora_b, p, tiles, scaling=scaling, u=u, norm=norm, grad_m=grad_m, **of_dora)
    grad_x = grad_a = None
    if need_x and dropout_base:
        assert grad_u is not None and dropout_seed is not None
        through_mask = base_grad_product(grad_u - grad_y, weight)
        through_mask.addmm_(q, lora_a.to(q.dtype), alpha=scaling)
        grad_x = dropout(through_mask, dropout_p, dropout_seed, add=base_grad_product(grad_y, weight))
    elif need_x:
        grad_x = lora_linear_bwd_dx(grad_y, weight, q, lora_a, tiles, scaling=scaling, **dropped, **of_dora)
    if need_a:
        assert x is not None
        grad_a = lora_grad(x, q, False, lora_a.dtype, tiles, scaling=scaling, **dropped)
    return grad_x, grad_a, grad_b if need_b else None, grad_m
