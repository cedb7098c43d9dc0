"""Triton kernels of the LoRA linear and their launchers.

y = x Wᵀ + bias + s (P ∘ gate) Bᵀ,  P = drop(x) Aᵀ
dX = dY W + drop'(s (Q ∘ gate) A),  Q = dY B,  dA = s (Q ∘ gate)ᵀ drop(x),  dB = s dYᵀ (P ∘ gate)

Every kernel accumulates in float32 and rounds once. Factors come in any float dtype and are rounded to x's in the
kernel. Dropout masks are recomputed (``tiles.dropout_keep``); the masked operand stays exact and 1/(1-p) multiplies
the float32 accumulator. Reductions that are split over programs go through float32 partials, summed in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coded import CodedOperand, Correction, coded_product
from .launch import KEEP_ALL, describe, dropout_arguments, ordered_sum, precision
from .lora_tiles import LoRATiles, ThinTiles
from .tiles import cast, dot, dropout_keep, load_tile, store_tile, tile_position

_NO_SPECIALIZE = ["M", "threshold_bits"]


@triton.jit
def _append_rank(acc, p_tile, b_ptr, gate_ptr, n0, r0, N, R, stride_bn, scaling,
                 BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + s (P ∘ gate) Bᵀ for BLOCK_R ranks: P is rounded to its dtype already, and s ∘ gate go onto it."""
    factor = scaling
    if gate_ptr is not None:
        offs_r = r0 + tl.arange(0, BLOCK_R)
        factor = scaling * tl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    b_tile = cast(load_tile(b_ptr, n0, r0, N, R, stride_bn, 1, BLOCK_N, BLOCK_R, False), p_tile.dtype)
    return dot(cast(p_tile.to(tl.float32) * factor, p_tile.dtype), b_tile.T, acc, PRECISION)


@triton.jit
def _scale_columns(tile, scale_ptr, col0, num_cols, COLS: tl.constexpr):
    """tile ∘ scale, rounded to the tile's dtype."""
    offs = col0 + tl.arange(0, COLS)
    scale = tl.load(scale_ptr + offs, mask=offs < num_cols, other=0.0)
    return cast(tile.to(tl.float32) * scale[None, :], tile.dtype)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _lora_linear_fwd_kernel(
    x, w, a, y,  # (M, K), (N, K), (R, K), (M, N): descriptors if USE_TMA, else pointers
    p_ptr, b_ptr, bias_ptr, gate_ptr, seed_ptr, scale_ptr, u_ptr,
    M, N, K, R, stride_xm, stride_wn, stride_wk, stride_ar, stride_bn,
    scaling, threshold_bits, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, FUSE_DOWN: tl.constexpr, STORE_P: tl.constexpr, DROPOUT: tl.constexpr,
    USE_TMA: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of y at a time; programs walk the tiles with the stride of the grid.

    FUSE_DOWN: P is a second accumulator of the main loop (R <= BLOCK_R), and the first column of programs writes it.
    Otherwise P is an operand, and the rank is appended to the reduction in steps of BLOCK_R.
    With a scale (DoRA's g) the sum u is multiplied by it, column by column, before the bias; u_ptr keeps u itself.
    """
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), num_pid_m * num_pid_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tile_position(tile, num_pid_m, num_pid_n, GROUP_M)
        m0 = pid_m * BLOCK_M
        n0 = pid_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc_p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x_tile = load_tile(x, m0, k0, M, K, stride_xm, 1, BLOCK_M, BLOCK_K, USE_TMA)
            w_tile = load_tile(w, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, USE_TMA)
            acc = dot(x_tile, w_tile.T, acc, PRECISION)
            if FUSE_DOWN:
                a_tile = cast(load_tile(a, 0, k0, R, K, stride_ar, 1, BLOCK_R, BLOCK_K, USE_TMA), dtype)
                if DROPOUT:
                    keep = dropout_keep(tl.load(seed_ptr), m0, k0, threshold_bits, BLOCK_M, BLOCK_K)
                    x_tile = cast(tl.where(keep, x_tile, 0.0), dtype)
                acc_p = dot(x_tile, a_tile.T, acc_p, PRECISION)

        if FUSE_DOWN:
            p_tile = cast(acc_p * keep_scale, dtype)
            if STORE_P and pid_n == 0:
                store_tile(p_ptr, p_tile, m0, 0, M, R, R, 1, BLOCK_M, BLOCK_R, False)
            acc = _append_rank(
                acc, p_tile, b_ptr, gate_ptr, n0, 0, N, R, stride_bn, scaling, BLOCK_N, BLOCK_R, PRECISION
            )
        else:
            # Not pipelined: a turn or two, and the stages of the main loop fill shared memory already.
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                p_tile = load_tile(p_ptr, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False)
                acc = _append_rank(
                    acc, p_tile, b_ptr, gate_ptr, n0, r0, N, R, stride_bn, scaling, BLOCK_N, BLOCK_R, PRECISION
                )

        offs_n = n0 + tl.arange(0, BLOCK_N)
        if scale_ptr is not None:
            if u_ptr is not None:
                store_tile(u_ptr, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N, False)
            acc *= tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        store_tile(y, acc, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N, USE_TMA)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _lora_linear_bwd_dx_kernel(
    dy, w, dx,  # (M, N), (N, K), (M, K): descriptors if USE_TMA, else pointers
    q_ptr, a_ptr, gate_ptr, seed_ptr, scale_ptr,
    M, N, K, R, stride_dym, stride_wn, stride_wk, stride_ar,
    scaling, threshold_bits, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, DROPOUT: tl.constexpr,
    USE_TMA: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_K) tile of dX at a time, reduced over N in steps of BLOCK_N.

    The correction comes first, while the accumulator holds nothing else: it alone is masked and scaled.
    With a scale (DoRA's g), dY is multiplied by it as it is read.
    """
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_k = tl.cdiv(K, BLOCK_K)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), num_pid_m * num_pid_k, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_k = tile_position(tile, num_pid_m, num_pid_k, GROUP_M)
        m0 = pid_m * BLOCK_M
        k0 = pid_k * BLOCK_K
        acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            q_tile = load_tile(q_ptr, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False)
            if gate_ptr is not None:
                offs_r = r0 + tl.arange(0, BLOCK_R)
                gate = tl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)
                q_tile = cast(q_tile.to(tl.float32) * gate[None, :], dtype)
            a_tile = cast(load_tile(a_ptr, r0, k0, R, K, stride_ar, 1, BLOCK_R, BLOCK_K, False), dtype)
            acc = dot(q_tile, a_tile, acc, PRECISION)
        acc = acc * (scaling * keep_scale)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), m0, k0, threshold_bits, BLOCK_M, BLOCK_K)
            acc = tl.where(keep, acc, 0.0)
        for n0 in range(0, N, BLOCK_N):
            dy_tile = load_tile(dy, m0, n0, M, N, stride_dym, 1, BLOCK_M, BLOCK_N, USE_TMA)
            if scale_ptr is not None:
                dy_tile = _scale_columns(dy_tile, scale_ptr, n0, N, BLOCK_N)
            w_tile = load_tile(w, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, USE_TMA)
            acc = dot(dy_tile, w_tile, acc, PRECISION)
        store_tile(dx, acc, m0, k0, M, K, K, 1, BLOCK_M, BLOCK_K, USE_TMA)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _lora_down_kernel(
    x_ptr, factor_ptr, seed_ptr, out_ptr,
    M, K, R, stride_xm, stride_fr, stride_fk, threshold_bits, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = drop(x) factorᵀ, (M, R). The factor is A with strides (K, 1), or B read as (R, N) with strides (1, R).

    Grid: (cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)); a program reads its rows of x once.
    """
    m0 = tl.program_id(0) * BLOCK_M
    r0 = tl.program_id(1) * BLOCK_R
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_tile = load_tile(x_ptr, m0, k0, M, K, stride_xm, 1, BLOCK_M, BLOCK_K, False)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), m0, k0, threshold_bits, BLOCK_M, BLOCK_K)
            x_tile = cast(tl.where(keep, x_tile, 0.0), dtype)
        factor = cast(load_tile(factor_ptr, k0, r0, K, R, stride_fk, stride_fr, BLOCK_K, BLOCK_R, False), dtype)
        acc = dot(x_tile, factor, acc, PRECISION)
    store_tile(out_ptr, acc * keep_scale, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _lora_up_add_kernel(
    y_ptr, p_ptr, factor_ptr, gate_ptr, seed_ptr, scale_ptr, bias_ptr, out_ptr,
    M, C, R, stride_fr, stride_fc, scaling, threshold_bits, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y += drop'(s (P ∘ gate) factor) in place, y (M, C) contiguous, factor read as (R, C).

    With a scale (DoRA's g) and an out: y keeps that sum u, out = g ∘ u + bias; without an out, y becomes that.
    Grid: (cdiv(M, BLOCK_M), cdiv(C, BLOCK_C)).
    """
    m0 = tl.program_id(0) * BLOCK_M
    c0 = tl.program_id(1) * BLOCK_C
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        p_tile = load_tile(p_ptr, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False)
        if gate_ptr is not None:
            offs_r = r0 + tl.arange(0, BLOCK_R)
            gate = tl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)
            p_tile = cast(p_tile.to(tl.float32) * gate[None, :], dtype)
        factor = cast(load_tile(factor_ptr, r0, c0, R, C, stride_fr, stride_fc, BLOCK_R, BLOCK_C, False), dtype)
        acc = dot(p_tile, factor, acc, PRECISION)
    acc = acc * (scaling * keep_scale)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), m0, c0, threshold_bits, BLOCK_M, BLOCK_C)
        acc = tl.where(keep, acc, 0.0)
    acc += load_tile(y_ptr, m0, c0, M, C, C, 1, BLOCK_M, BLOCK_C, False).to(tl.float32)
    target = y_ptr
    if scale_ptr is not None:
        offs_c = c0 + tl.arange(0, BLOCK_C)
        if out_ptr is not None:
            store_tile(y_ptr, acc, m0, c0, M, C, C, 1, BLOCK_M, BLOCK_C, False)
            target = out_ptr
        acc *= tl.load(scale_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    store_tile(target, acc, m0, c0, M, C, C, 1, BLOCK_M, BLOCK_C, False)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _lora_grad_kernel(
    big_ptr, small_ptr, gate_ptr, seed_ptr, out_ptr,
    M, C, R, stride_bm, stride_os, stride_or, stride_oc, rows_per_split, scaling, threshold_bits, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split] = s (small ∘ gate)ᵀ drop(big) over the rows of one split; strides place it as (R, C) or (C, R).

    dA with big = x, small = Q; dB with big = dY, small = P. Grid: (cdiv(C, BLOCK_C), splits, cdiv(R, BLOCK_R)).
    """
    c0 = tl.program_id(0) * BLOCK_C
    split = tl.program_id(1)
    r0 = tl.program_id(2) * BLOCK_R
    dtype: tl.constexpr = big_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    first = split * rows_per_split
    last = min(first + rows_per_split, M)
    for m0 in range(first, last, BLOCK_M):
        big = load_tile(big_ptr, m0, c0, last, C, stride_bm, 1, BLOCK_M, BLOCK_C, False)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), m0, c0, threshold_bits, BLOCK_M, BLOCK_C)
            big = cast(tl.where(keep, big, 0.0), dtype)
        small = load_tile(small_ptr, m0, r0, last, R, R, 1, BLOCK_M, BLOCK_R, False)
        acc = dot(small.T, big, acc, PRECISION)
    acc = acc * (scaling * keep_scale)
    if gate_ptr is not None:
        offs_r = r0 + tl.arange(0, BLOCK_R)
        acc = acc * tl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + split.to(tl.int64) * stride_os
    store_tile(out, acc, r0, c0, R, C, stride_or, stride_oc, BLOCK_R, BLOCK_C, False)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _lora_bwd_q_grad_b_kernel(
    dy_ptr, b_ptr, p_ptr, gate_ptr, q_ptr, grad_b_ptr, scale_ptr, u_ptr, norm_ptr, grad_m_ptr, du_ptr,
    M, N, R, stride_dym, stride_bn, stride_partial, scaling, columns_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q = dY B and dB = s dYᵀ (P ∘ gate) from one read of dY.

    A program takes BLOCK_M rows and a range of columns: Q accumulates over its columns in registers, each column
    tile's share of dB goes straight out. Grid: (cdiv(M, BLOCK_M), column splits, cdiv(R, BLOCK_R)).
    q is (column splits, M, R), grad_b (row programs, N, R): partials in float32, or the result where there is one;
    row programs are stride_partial apart.
    With a scale (DoRA's g), dY is multiplied by it as it is read, and that product goes to du where it is asked for;
    grad_m = Σ_m dY ∘ u / n of the program's rows comes from the unscaled dY; it is 0 where n is.
    """
    pid_m = tl.program_id(0)
    split = tl.program_id(1)
    r0 = tl.program_id(2) * BLOCK_R
    m0 = pid_m * BLOCK_M
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    p_tile = load_tile(p_ptr, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False)
    factor = scaling
    if gate_ptr is not None:
        offs_r = r0 + tl.arange(0, BLOCK_R)
        factor = scaling * tl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    acc_q = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    partial = pid_m.to(tl.int64) * stride_partial
    first = split * columns_per_split
    for n0 in range(first, min(first + columns_per_split, N), BLOCK_N):
        dy_tile = load_tile(dy_ptr, m0, n0, M, N, stride_dym, 1, BLOCK_M, BLOCK_N, False)
        if scale_ptr is not None:
            if grad_m_ptr is not None and r0 == 0:
                u_tile = load_tile(u_ptr, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N, False)
                offs_n = n0 + tl.arange(0, BLOCK_N)
                norm = tl.load(norm_ptr + offs_n, mask=offs_n < N, other=1.0)
                grad_m = tl.sum(dy_tile.to(tl.float32) * u_tile.to(tl.float32), axis=0)
                grad_m = tl.where(norm == 0.0, 0.0, grad_m / tl.where(norm == 0.0, 1.0, norm))
                tl.store(grad_m_ptr + partial + offs_n, cast(grad_m, grad_m_ptr.dtype.element_ty), mask=offs_n < N)
            dy_tile = _scale_columns(dy_tile, scale_ptr, n0, N, BLOCK_N)
            if du_ptr is not None and r0 == 0:
                store_tile(du_ptr, dy_tile, m0, n0, M, N, N, 1, BLOCK_M, BLOCK_N, False)
        b_tile = cast(load_tile(b_ptr, n0, r0, N, R, stride_bn, 1, BLOCK_N, BLOCK_R, False), dtype)
        acc_q = dot(dy_tile, b_tile, acc_q, PRECISION)
        share = dot(dy_tile.T, p_tile, tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32), PRECISION)
        store_tile(grad_b_ptr + partial, share * factor, n0, r0, N, R, R, 1, BLOCK_N, BLOCK_R, False)
    q = q_ptr + split.to(tl.int64) * M * R
    store_tile(q, acc_q, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False)


# ---------------------------------------------------------------------------------------------------------- launchers


def base_product(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias by the library, by the weight's own kernel, or by the weight itself."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    product: Tensor = coded_product(x, weight, bias) if isinstance(weight, CodedOperand) else weight.product(x, bias)
    return product


def base_grad_product(grad_y: Tensor, weight: Any) -> Tensor:
    """dY W, likewise."""
    if isinstance(weight, CodedOperand):
        return coded_product(grad_y, weight, grad=True)
    product: Tensor = grad_y @ weight if isinstance(weight, Tensor) else weight.grad_product(grad_y)
    return product


def lora_down(
    x: Tensor, factor: Tensor, rank_last: bool, tiles: LoRATiles, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """drop(x) Aᵀ, or with ``rank_last`` x B (the factor stored as (C, R)); (M, R) in x's dtype."""
    M, K = x.shape
    R = factor.shape[1 if rank_last else 0]
    strides = x.stride(0), *(reversed(factor.stride()) if rank_last else factor.stride())
    out = x.new_empty(M, R)
    seed, *keep = dropout_arguments(dropout_p, seed)
    t = tiles.down
    blocks = {"BLOCK_M": t.BLOCK_M, "BLOCK_K": t.BLOCK_C, "BLOCK_R": t.BLOCK_R}
    _lora_down_kernel[(triton.cdiv(M, t.BLOCK_M), triton.cdiv(R, t.BLOCK_R))](
        x, factor, seed, out, M, K, R, *strides, *keep, **blocks, **_thin_options(t, x, seed)
    )
    return out


def _thin_options(t: ThinTiles, of: Tensor, seed: Tensor | None) -> dict[str, Any]:
    """The constants that all thin kernels take, but for their tiles."""
    warps = {"num_warps": t.num_warps, "num_stages": t.num_stages}
    return {"DROPOUT": seed is not None, "PRECISION": precision(of.dtype), **warps}


def _up_add(
    y: Tensor, p: Tensor, factor: Tensor, rank_last: bool, tiles: LoRATiles, *, gate: Tensor | None, scaling: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, column_scale: Tensor | None = None, bias: Tensor | None = None,
    out: Tensor | None = None,
) -> None:  # fmt: skip
    """y += drop'(s (p ∘ gate) factor) after a library product, in place; with ``column_scale`` see the kernel."""
    if dropout_p == 0.0 and column_scale is None:
        gated = p if gate is None else p * gate.to(p.dtype)
        y.addmm_(gated, (factor.T if rank_last else factor).to(p.dtype), alpha=scaling)
        return
    M, C = y.shape
    strides = reversed(factor.stride()) if rank_last else factor.stride()
    seed, *keep = dropout_arguments(dropout_p, seed)
    t = tiles.up_add
    blocks = {"BLOCK_M": t.BLOCK_M, "BLOCK_C": t.BLOCK_C, "BLOCK_R": t.BLOCK_R}
    _lora_up_add_kernel[(triton.cdiv(M, t.BLOCK_M), triton.cdiv(C, t.BLOCK_C))](
        y, p, factor, gate, seed, column_scale, bias, out, M, C, p.shape[1], *strides, scaling, *keep,
        **blocks, **_thin_options(t, y, seed),
    )  # fmt: skip


def lora_linear_fwd(
    x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, tiles: LoRATiles, *, scaling: float, store_p: bool,
    bias: Tensor | None = None, gate: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
    column_scale: Tensor | None = None, u: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y (M, N) and, when ``store_p``, P (M, R), both in x's dtype, by the strategy of ``tiles``.

    x (M, K) with unit column stride; factors with unit column stride; weight (N, K) of any strides, or of codes.
    ``column_scale`` (N,) float32 multiplies the sum before the bias (DoRA); ``u`` (M, N) receives the sum itself.
    """
    M, K = x.shape
    N, R = lora_b.shape
    if M == 0 or N == 0:
        return x.new_empty(M, N), x.new_empty(M, R) if store_p else None
    fused = tiles.strategy == "fused"
    p = None if fused else lora_down(x, lora_a, False, tiles, dropout_p, dropout_seed)
    if tiles.strategy == "library":
        assert p is not None
        if column_scale is None:
            y = base_product(x, weight, bias)
            _up_add(y, p, lora_b, True, tiles, gate=gate, scaling=scaling)
            return y, p
        product = torch.mm(x, weight.T, out=u) if isinstance(weight, Tensor) else base_product(x, weight)
        if u is not None and product is not u:
            product = u.copy_(product)
        y = product if u is None else torch.empty_like(u)
        scaled = {"column_scale": column_scale, "bias": bias, "out": None if u is None else y}
        _up_add(product, p, lora_b, True, tiles, gate=gate, scaling=scaling, **scaled)
        return y, p

    if p is None:
        p = x.new_empty(M, R) if store_p else x.new_empty(1, R)
    t = tiles.main
    if isinstance(weight, CodedOperand):
        made = Correction(p, lora_b, t.BLOCK_R, scaling, gate)
        if fused:  # only the kernel that makes P draws the mask
            made = made._replace(down=lora_a, store_p=store_p, dropout_p=dropout_p, dropout_seed=dropout_seed)
        y = coded_product(x, weight, bias, correction=made, column_scale=column_scale, u=u)
        return y, p if store_p else None
    y = x.new_empty(M, N)
    x_arg, w_arg, a_arg, y_arg = describe(
        t.tma,
        (x, [t.BLOCK_M, t.BLOCK_K]),
        (weight, [t.BLOCK_N, t.BLOCK_K]),
        (lora_a, [t.BLOCK_R, t.BLOCK_K]),
        (y, [t.BLOCK_M, t.BLOCK_N]),
    )
    # Only the kernel that makes P draws the mask.
    seed, *keep = dropout_arguments(dropout_p, dropout_seed) if fused else KEEP_ALL
    strides = x.stride(0), *weight.stride(), lora_a.stride(0), lora_b.stride(0)
    what = {"FUSE_DOWN": fused, "STORE_P": store_p, "DROPOUT": seed is not None, "FLATTEN": t.flatten}
    _lora_linear_fwd_kernel[(t.programs(M, N),)](
        x_arg, w_arg, a_arg, y_arg, p, lora_b, bias, gate, seed, column_scale, u, M, N, K, R, *strides, scaling, *keep,
        **t.blocks, **what, USE_TMA=t.tma, PRECISION=precision(x.dtype), **t.options,
    )  # fmt: skip
    return y, p if store_p else None


def lora_linear_bwd_dx(
    grad_y: Tensor, weight: Any, q: Tensor, lora_a: Tensor, tiles: LoRATiles, *, scaling: float,
    gate: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
    column_scale: Tensor | None = None, grad_u: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dX = dY W + drop'(s (Q ∘ gate) A), (M, K) in grad_y's dtype.

    ``column_scale`` (N,) multiplies dY first (DoRA); a library's product takes that product as ``grad_u``.
    """
    M, N = grad_y.shape
    R, K = lora_a.shape
    if tiles.strategy == "library":
        grad_x = base_grad_product(grad_y if grad_u is None else grad_u, weight)
        _up_add(grad_x, q, lora_a, False, tiles, gate=gate, scaling=scaling, dropout_p=dropout_p, seed=dropout_seed)
        return grad_x
    t = tiles.main_dx
    if isinstance(weight, CodedOperand):
        made = Correction(q, lora_a, t.BLOCK_R, scaling, gate, dropout_p=dropout_p, dropout_seed=dropout_seed)
        return coded_product(grad_y, weight, grad=True, correction=made, column_scale=column_scale)
    grad_x = grad_y.new_empty(M, K)
    # The tile's N and K are those of the product dY W: its columns are K, its reduction is N.
    dy_arg, w_arg, dx_arg = describe(
        t.tma, (grad_y, [t.BLOCK_M, t.BLOCK_K]), (weight, [t.BLOCK_K, t.BLOCK_N]), (grad_x, [t.BLOCK_M, t.BLOCK_N])
    )
    blocks = {**t.blocks, "BLOCK_N": t.BLOCK_K, "BLOCK_K": t.BLOCK_N, "FLATTEN": t.flatten}
    seed, *keep = dropout_arguments(dropout_p, dropout_seed)
    strides = grad_y.stride(0), *weight.stride(), lora_a.stride(0)
    _lora_linear_bwd_dx_kernel[(t.programs(M, K),)](
        dy_arg, w_arg, dx_arg, q, lora_a, gate, seed, column_scale, M, N, K, R, *strides, scaling, *keep,
        **blocks, DROPOUT=seed is not None, USE_TMA=t.tma, PRECISION=precision(grad_y.dtype), **t.options,
    )  # fmt: skip
    return grad_x


def lora_grad(
    big: Tensor,
    small: Tensor,
    rank_last: bool,
    out_dtype: torch.dtype,
    tiles: LoRATiles,
    *,
    scaling: float,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """s (small ∘ gate)ᵀ drop(big): (R, C), or with ``rank_last`` its transpose (C, R); in ``out_dtype``."""
    M, C = big.shape
    R = small.shape[1]
    t = tiles.grad
    splits = t.splits(M, C, R)
    shape = (C, R) if rank_last else (R, C)
    out = big.new_empty(shape, dtype=out_dtype)
    partial = out if splits == 1 else big.new_empty((splits, *shape), dtype=torch.float32)
    strides = big.stride(0), C * R, *((1, R) if rank_last else (C, 1))
    seed, *keep = dropout_arguments(dropout_p, dropout_seed)
    rows_per_split = triton.cdiv(triton.cdiv(M, t.BLOCK_M), splits) * t.BLOCK_M
    blocks = {"BLOCK_M": t.BLOCK_M, "BLOCK_C": t.BLOCK_C, "BLOCK_R": t.BLOCK_R}
    _lora_grad_kernel[(triton.cdiv(C, t.BLOCK_C), splits, triton.cdiv(R, t.BLOCK_R))](
        big, small, gate, seed, partial, M, C, R, *strides, rows_per_split, scaling, *keep,
        **blocks, **_thin_options(t, big, seed),
    )  # fmt: skip
    return out if splits == 1 else ordered_sum(partial, out)


def lora_bwd_q_grad_b(
    grad_y: Tensor, lora_b: Tensor, p: Tensor, tiles: LoRATiles, *, scaling: float, gate: Tensor | None = None,
    column_scale: Tensor | None = None, u: Tensor | None = None, norm: Tensor | None = None,
    grad_m: Tensor | None = None, grad_u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Q = dY B (M, R) in grad_y's dtype and dB = s dYᵀ (P ∘ gate) (N, R) in lora_b's, from one read of dY.

    With ``column_scale`` (N,) both are those of g ∘ dY (DoRA). ``grad_m`` (N,), of any float dtype, receives
    Σ_m dY ∘ u / n from ``u`` (M, N) and ``norm`` (N,) float32, and ``grad_u`` (M, N) g ∘ dY.
    """
    M, N = grad_y.shape
    R = lora_b.shape[1]
    t = tiles.q_grad_b
    row_programs = triton.cdiv(M, t.BLOCK_M)
    splits = triton.cdiv(N, t.columns_per_split)
    q, grad_b = grad_y.new_empty(M, R), torch.empty_like(lora_b, memory_format=torch.contiguous_format)
    q_out = q if splits == 1 else grad_y.new_empty((splits, M, R), dtype=torch.float32)
    grad_b_out, grad_m_out, stride_partial = grad_b, grad_m, 0
    if row_programs > 1:
        # One row of partials holds dB's and, after it, the magnitude's: one launch adds up both.
        stride_partial = N * R + (0 if grad_m is None else N)
        grad_b_out = grad_y.new_empty((row_programs, stride_partial), dtype=torch.float32)
        grad_m_out = None if grad_m is None else grad_b_out[0, N * R :]
    tensors = grad_y, lora_b, p, gate, q_out, grad_b_out, column_scale, u, norm, grad_m_out, grad_u
    sizes = M, N, R, grad_y.stride(0), lora_b.stride(0), stride_partial, scaling, t.columns_per_split
    blocks = {"BLOCK_M": t.BLOCK_M, "BLOCK_N": t.BLOCK_N, "BLOCK_R": t.BLOCK_R, "PRECISION": precision(grad_y.dtype)}
    _lora_bwd_q_grad_b_kernel[(row_programs, splits, triton.cdiv(R, t.BLOCK_R))](
        *tensors, *sizes, **blocks, num_warps=t.num_warps, num_stages=t.num_stages
    )
    if splits > 1:
        ordered_sum(q_out, q)
    if row_programs > 1:
        ordered_sum(grad_b_out, grad_b, grad_m)
    return q, grad_b


def lora_linear_bwd(
    grad_y: Tensor, x: Tensor | None, weight: Any, lora_a: Tensor, lora_b: Tensor, p: Tensor | None,
    tiles: LoRATiles, *, scaling: float, needs: tuple[bool, ...], gate: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, need_q: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dX, dA, dB, Q), each None unless needed; ``needs`` is for (x, lora_a, lora_b), ``need_q`` for the caller."""
    M, (R, K) = grad_y.shape[0], lora_a.shape
    need_x, need_a, need_b = needs
    need_q = need_q or need_x or need_a
    if M == 0:
        return (
            grad_y.new_zeros(0, K) if need_x else None,
            torch.zeros_like(lora_a) if need_a else None,
            torch.zeros_like(lora_b) if need_b else None,
            grad_y.new_zeros(0, R) if need_q else None,
        )
    q = grad_x = grad_a = grad_b = None
    dropped = {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
    if need_b and need_q:
        assert p is not None
        q, grad_b = lora_bwd_q_grad_b(grad_y, lora_b, p, tiles, scaling=scaling, gate=gate)
    elif need_b:
        assert p is not None
        grad_b = lora_grad(grad_y, p, True, lora_b.dtype, tiles, scaling=scaling, gate=gate)
    elif need_q:
        q = lora_down(grad_y, lora_b, True, tiles)
    if need_x:
        assert q is not None
        grad_x = lora_linear_bwd_dx(grad_y, weight, q, lora_a, tiles, scaling=scaling, gate=gate, **dropped)
    if need_a:
        assert q is not None and x is not None
        grad_a = lora_grad(x, q, False, lora_a.dtype, tiles, scaling=scaling, gate=gate, **dropped)
    return grad_x, grad_a, grad_b, q


__all__ = ["lora_linear_bwd", "lora_linear_fwd"]
