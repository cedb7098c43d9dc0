"""Triton kernels of many adapters on one batch, and their launchers.

A factor holds the adapters' factors one after another along the rank, (ΣR, width) for A and B alike, so three kernels
serve both directions: with ``down`` P = drop(x) Aᵀ and Q = dY B, with ``up`` y += s P Bᵀ and dX += drop'(s Q A), with
``grad`` dA = s Qᵀ drop(x) and dB = s dYᵀ P. A program finds its adapter's rows of the factor in the table, by offset,
and works at that adapter's own rank. Programs take their rows from the plan's tiles, through its order: no row is
moved, and rows without an adapter cost nothing.

``up`` adds to a library's base product. Where our own base product is to be had for less than that product and another
pass over y (a few rows: the weight is read either way), one kernel makes both, ``multi_lora_linear_fwd``.

Every kernel accumulates in float32 and rounds once; nothing is added by atomics. The grid depends on shapes alone, so
that a captured graph replays with other ids and other ranks: programs without work return.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TRITON_DTYPES, describe, precision
from .lora_tiles import MainTiles
from .multi_lora_tiles import DOWN_COLUMNS, TILE_ROWS, AdapterRows, MultiLoRATiles
from .tiles import cast, dot, dropout_keep_rows, load_tile, store_tile, tile_position

_NO_SPECIALIZE = ["M"]


@triton.jit
def _rows_of(order_ptr, first, last, ROWS: tl.constexpr):
    """(row numbers, which of them there are) of the plan's entries first : last, ROWS of them."""
    offs = first + tl.arange(0, ROWS)
    mask = offs < last
    return tl.load(order_ptr + offs, mask=mask, other=0).to(tl.int64), mask


@triton.jit
def _load_rows(ptr, rows, mask_rows, col0, num_cols, stride, COLS: tl.constexpr):
    """Rows from anywhere, COLS columns from col0; zero where there are none, for they take part in dot products."""
    cols = col0 + tl.arange(0, COLS)
    mask = mask_rows[:, None] & (cols < num_cols)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, tile, rows, mask_rows, col0, num_cols, stride, COLS: tl.constexpr):
    cols = col0 + tl.arange(0, COLS)
    mask = mask_rows[:, None] & (cols < num_cols)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], cast(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _multi_lora_down_kernel(
    x_ptr, factor_ptr, table_ptr, order_ptr, tiles_ptr, threshold_ptr, keep_scale_ptr, seed_ptr, out_ptr,
    M, C, max_rank, stride_xm, stride_fr, parts_per_program,
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, m, r] = Σ_c drop(x)[m, c] factor[start + r, c] / (1 - p) over the columns of one split, float32.

    A split is ``parts_per_program`` parts of PART columns, each summed on its own and added in order: the same bits as
    when every part is a split and ``up`` adds them. Grid: (tiles, splits, cdiv(max_rank, BLOCK_R)).
    """
    adapter = tl.load(tiles_ptr + 3 * tl.program_id(0))
    split = tl.program_id(1)
    r0 = tl.program_id(2) * BLOCK_R
    rank = tl.load(table_ptr + 3 * adapter + 1, mask=adapter >= 0, other=0)
    if r0 < rank:
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        first = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
        count = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
        rows, mask_rows = _rows_of(order_ptr, first, first + count, BLOCK_M)
        factor = factor_ptr + tl.load(table_ptr + 3 * adapter).to(tl.int64) * stride_fr
        total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
        for part in range(split * parts_per_program, (split + 1) * parts_per_program):
            acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            for c0 in range(part * PART, min((part + 1) * PART, C), BLOCK_C):
                x_tile = _load_rows(x_ptr, rows, mask_rows, c0, C, stride_xm, BLOCK_C)
                if seed_ptr is not None:
                    threshold = tl.load(threshold_ptr + adapter)
                    keep = dropout_keep_rows(tl.load(seed_ptr), rows, c0, threshold, BLOCK_C)
                    x_tile = cast(tl.where(keep, x_tile, 0.0), dtype)
                f_tile = cast(load_tile(factor, r0, c0, rank, C, stride_fr, 1, BLOCK_R, BLOCK_C, False), dtype)
                acc = dot(x_tile, f_tile.T, acc, PRECISION)
            total += acc
        if seed_ptr is not None:
            total *= tl.load(keep_scale_ptr + adapter)
        out = out_ptr + split.to(tl.int64) * M * max_rank
        _store_rows(out, total, rows, mask_rows, r0, rank, max_rank, BLOCK_R)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _multi_lora_up_kernel(
    y_ptr, p_ptr, factor_ptr, table_ptr, scalings_ptr, order_ptr, tiles_ptr, weights_ptr,
    threshold_ptr, keep_scale_ptr, seed_ptr, scale_ptr, bias_ptr, out_ptr,
    M, C, max_rank, splits, stride_ym, stride_fr, stride_scale, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m] += drop'(s w P[m] factor[own rows]) in place, y (M, C); P is the sum of its splits, in order.

    With a scale (the DoRA adapters' g, a row of C each): y keeps that sum u, out = g ∘ u + bias, for every row of the
    batch; without an out, y becomes that. Grid: (tiles, cdiv(C, BLOCK_C)).
    """
    adapter = tl.load(tiles_ptr + 3 * tl.program_id(0))
    count = tl.load(tiles_ptr + 3 * tl.program_id(0) + 2)
    c0 = tl.program_id(1) * BLOCK_C
    live = count > 0
    if scale_ptr is None:
        live = live & (adapter >= 0)
    if live:
        first = tl.load(tiles_ptr + 3 * tl.program_id(0) + 1)
        rows, mask_rows = _rows_of(order_ptr, first, first + count, BLOCK_M)
        there = adapter >= 0
        rank = tl.load(table_ptr + 3 * adapter + 1, mask=there, other=0)
        factor = factor_ptr + tl.load(table_ptr + 3 * adapter, mask=there, other=0).to(tl.int64) * stride_fr
        acc = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
        for r0 in range(0, rank, BLOCK_R):
            total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            p = p_ptr
            for _ in range(splits):
                total += _load_rows(p, rows, mask_rows, r0, rank, max_rank, BLOCK_R)
                p += M.to(tl.int64) * max_rank
            f_tile = cast(load_tile(factor, r0, c0, rank, C, stride_fr, 1, BLOCK_R, BLOCK_C, False), DTYPE)
            acc = dot(cast(total, DTYPE), f_tile, acc, PRECISION)
        scaling = tl.load(scalings_ptr + adapter, mask=there, other=0.0)
        if seed_ptr is not None:
            scaling *= tl.load(keep_scale_ptr + adapter, mask=there, other=0.0)
        acc *= scaling
        if weights_ptr is not None:
            acc *= tl.load(weights_ptr + rows, mask=mask_rows, other=0.0)[:, None]
        if seed_ptr is not None:
            threshold = tl.load(threshold_ptr + adapter, mask=there, other=0)
            acc = tl.where(dropout_keep_rows(tl.load(seed_ptr), rows, c0, threshold, BLOCK_C), acc, 0.0)
        acc += _load_rows(y_ptr, rows, mask_rows, c0, C, stride_ym, BLOCK_C).to(tl.float32)
        target = y_ptr
        stride = stride_ym
        if scale_ptr is not None:
            if out_ptr is not None:
                _store_rows(y_ptr, acc, rows, mask_rows, c0, C, stride_ym, BLOCK_C)
                target = out_ptr
                stride = stride_om
            cols = c0 + tl.arange(0, BLOCK_C)
            dora = tl.load(table_ptr + 3 * adapter + 2, mask=there, other=-1)
            # Rows of LoRA adapters, and those without one, are not scaled.
            scaled = (cols < C) & (dora >= 0)
            acc *= tl.load(scale_ptr + dora.to(tl.int64) * stride_scale + cols, mask=scaled, other=1.0)[None, :]
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
        _store_rows(target, acc, rows, mask_rows, c0, C, stride, BLOCK_C)


@triton.jit(do_not_specialize=_NO_SPECIALIZE)
def _multi_lora_linear_fwd_kernel(
    x, w, y_ptr,  # (M, K), (N, K): descriptors if USE_TMA, else pointers; (M, N)
    p_ptr, factor_ptr, table_ptr, scalings_ptr, ids_ptr, weights_ptr, scale_ptr, bias_ptr, u_ptr,
    M, N, K, max_rank, stride_xm, stride_wn, stride_wk, stride_ym, stride_fr, stride_scale, stride_um,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
    GROUP_M: tl.constexpr, USE_TMA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of y = g ∘ (x Wᵀ + s w P B) + bias, in one accumulator; P is from the down kernel.

    The rows are as they come, each with its own adapter: rank by rank, every row reads its own row of the factor, and
    none past its rank. Nothing of one row meets another's. BLOCK_R ranks are read at once, since each is a wait.
    With a scale (the DoRA adapters' g, a row of N each) u_ptr keeps the sum. Grid: (tiles,).
    """
    pid_m, pid_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0 = pid_m * BLOCK_M
    n0 = pid_n * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_tile = load_tile(x, m0, k0, M, K, stride_xm, 1, BLOCK_M, BLOCK_K, USE_TMA)
        w_tile = load_tile(w, n0, k0, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, USE_TMA)
        acc = dot(x_tile, w_tile.T, acc, PRECISION)

    rows = m0 + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    mask_rows = rows < M
    ids = tl.load(ids_ptr + rows, mask=mask_rows, other=-1)
    rows = rows.to(tl.int64)
    there = ids >= 0
    rank = tl.load(table_ptr + 3 * ids + 1, mask=there, other=0)
    first = tl.load(table_ptr + 3 * ids, mask=there, other=0).to(tl.int64)
    scaling = tl.load(scalings_ptr + ids, mask=there, other=0.0)
    if weights_ptr is not None:
        scaling *= tl.load(weights_ptr + rows, mask=mask_rows, other=0.0)
    for r in tl.range(0, tl.max(rank), num_stages=1, loop_unroll_factor=BLOCK_R):
        mine = r < rank
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(p_ptr + (split * M.to(tl.int64) + rows) * max_rank + r, mask=mine, other=0.0)
        mask = mine[:, None] & (cols < N)[None, :]
        factor = tl.load(factor_ptr + (first + r)[:, None] * stride_fr + cols[None, :], mask=mask, other=0.0)
        acc += (total * scaling)[:, None] * cast(factor, DTYPE).to(tl.float32)

    if scale_ptr is not None:
        if u_ptr is not None:
            _store_rows(u_ptr, acc, rows, mask_rows, n0, N, stride_um, BLOCK_N)
        dora = tl.load(table_ptr + 3 * ids + 2, mask=there, other=-1)
        # Rows of LoRA adapters, and those without one, are not scaled.
        scaled = (dora >= 0)[:, None] & (cols < N)[None, :]
        acc *= tl.load(scale_ptr + dora.to(tl.int64)[:, None] * stride_scale + cols[None, :], mask=scaled, other=1.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    _store_rows(y_ptr, acc, rows, mask_rows, n0, N, stride_ym, BLOCK_N)


@triton.jit
def _multi_lora_grad_kernel(
    big_ptr, small_ptr, table_ptr, scalings_ptr, order_ptr, bounds_ptr, weights_ptr,
    threshold_ptr, keep_scale_ptr, seed_ptr, out_ptr,
    C, stride_bm, stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[start + r, c] = s Σ_m w small[m, r] drop(big)[m, c] over an adapter's rows, from the first to the last.

    An adapter without rows gets zeros. Grid: (cdiv(C, BLOCK_C), adapters, cdiv(max_rank, BLOCK_R)).
    """
    c0 = tl.program_id(0) * BLOCK_C
    adapter = tl.program_id(1)
    r0 = tl.program_id(2) * BLOCK_R
    rank = tl.load(table_ptr + 3 * adapter + 1)
    if r0 < rank:
        dtype: tl.constexpr = big_ptr.dtype.element_ty
        first = tl.load(bounds_ptr + adapter)
        last = tl.load(bounds_ptr + adapter + 1)
        acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
        for m0 in range(first, last, BLOCK_M):
            rows, mask_rows = _rows_of(order_ptr, m0, last, BLOCK_M)
            big = _load_rows(big_ptr, rows, mask_rows, c0, C, stride_bm, BLOCK_C)
            if seed_ptr is not None:
                threshold = tl.load(threshold_ptr + adapter)
                big = cast(
                    tl.where(dropout_keep_rows(tl.load(seed_ptr), rows, c0, threshold, BLOCK_C), big, 0.0), dtype
                )
            small = _load_rows(small_ptr, rows, mask_rows, r0, rank, stride_sm, BLOCK_R)
            if weights_ptr is not None:
                small = small.to(tl.float32) * tl.load(weights_ptr + rows, mask=mask_rows, other=0.0)[:, None]
            acc = dot(cast(small, dtype).T, big, acc, PRECISION)
        scaling = tl.load(scalings_ptr + adapter)
        if seed_ptr is not None:
            scaling *= tl.load(keep_scale_ptr + adapter)
        out = out_ptr + tl.load(table_ptr + 3 * adapter).to(tl.int64) * C
        store_tile(out, acc * scaling, r0, c0, rank, C, C, 1, BLOCK_R, BLOCK_C, False)


# ---------------------------------------------------------------------------------------------------------- launchers


def _dropout_arguments(rows: AdapterRows) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(thresholds as int32 bit patterns, 1 / (1 - p), seed), a value an adapter; None: no dropout."""
    p = rows.dropout_p
    if p is None:
        return None, None, None
    # int64 to int32 keeps the low bits, which is what a bit pattern is.
    return (p * 2.0**32).to(torch.int64).to(torch.int32), (1.0 / (1.0 - p)).float(), rows.dropout_seed


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def multi_lora_down(x: Tensor, factor: Tensor, rows: AdapterRows, max_rank: int, t: MultiLoRATiles) -> Tensor:
    """P = drop(x) factorᵀ of each row's own adapter: (splits, M, max_rank) float32, to be summed over splits in order.

    Zero past a row's rank. x (M, C) and factor (ΣR, C) with unit column stride.
    """
    M, C = x.shape
    out = x.new_zeros(t.splits, M, max_rank, dtype=torch.float32)
    if out.numel() == 0:
        return out
    threshold, keep_scale, seed = _dropout_arguments(rows)
    sizes = M, C, max_rank, x.stride(0), factor.stride(0), triton.cdiv(triton.cdiv(C, DOWN_COLUMNS), t.splits)
    _multi_lora_down_kernel[(rows.tiles.shape[0], t.splits, triton.cdiv(max_rank, t.BLOCK_R))](
        x, factor, rows.table, rows.order, rows.tiles, threshold, keep_scale, seed, out, *sizes, PART=DOWN_COLUMNS,
        BLOCK_M=TILE_ROWS, BLOCK_C=t.BLOCK_K, BLOCK_R=t.BLOCK_R, PRECISION=precision(x.dtype), **t.options,
    )  # fmt: skip
    return out


def multi_lora_up_(
    y: Tensor,
    p: Tensor,
    factor: Tensor,
    rows: AdapterRows,
    t: MultiLoRATiles,
    *,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """y += drop'(s w P factor), each row by its own adapter, in place; with ``column_scale`` see the kernel.

    y and out (M, C) with unit column stride; p from :func:`multi_lora_down`; ``dtype``: what P and the factor are
    rounded to, y's unless y is a wider sum.
    """
    splits, M, max_rank = p.shape
    C = y.shape[1]
    if y.numel() == 0:
        return
    dtype = dtype or y.dtype
    plan = rows.table, rows.scalings, rows.order, rows.tiles, rows.weights
    strides = y.stride(0), factor.stride(0), _row_stride(column_scale), _row_stride(out)
    _multi_lora_up_kernel[(rows.tiles.shape[0], triton.cdiv(C, t.BLOCK_C))](
        y, p, factor, *plan, *_dropout_arguments(rows), column_scale, bias, out, M, C, max_rank, splits, *strides,
        BLOCK_M=TILE_ROWS, BLOCK_C=t.BLOCK_C, BLOCK_R=t.BLOCK_R, DTYPE=TRITON_DTYPES[dtype],
        PRECISION=precision(dtype), **t.options,
    )  # fmt: skip


def multi_lora_linear_fwd(
    x: Tensor, weight: Any, p: Tensor, factor: Tensor, rows: AdapterRows, ids: Tensor, y: Tensor, t: MainTiles, *,
    column_scale: Tensor | None = None, bias: Tensor | None = None, u: Tensor | None = None,
) -> None:  # fmt: skip
    """y = g ∘ (x Wᵀ + s w P factor) + bias, each row by its own adapter, in one kernel, rounded once.

    x (M, K), factor (ΣR, N), y and u (M, N) with unit column stride, weight (N, K) of any strides, p from
    :func:`multi_lora_down`, ids (M,) int32; ``u``: receives y before g and bias.
    """
    splits, M, max_rank = p.shape
    N, K = weight.shape
    if M == 0 or N == 0:
        return
    x_arg, w_arg = describe(t.tma, (x, [t.BLOCK_M, t.BLOCK_K]), (weight, [t.BLOCK_N, t.BLOCK_K]))
    strides = x.stride(0), *weight.stride(), y.stride(0), factor.stride(0), _row_stride(column_scale), _row_stride(u)
    _multi_lora_linear_fwd_kernel[(t.programs(M, N),)](
        x_arg, w_arg, y, p, factor, rows.table, rows.scalings, ids, rows.weights, column_scale, bias, u,
        M, N, K, max_rank, *strides, **t.blocks, SPLITS=splits, USE_TMA=t.tma, DTYPE=TRITON_DTYPES[x.dtype],
        PRECISION=precision(x.dtype), **t.options,
    )  # fmt: skip


def multi_lora_grad(
    big: Tensor, small: Tensor, rows: AdapterRows, factor_rows: int, out_dtype: torch.dtype, t: MultiLoRATiles
) -> Tensor:
    """The factor's gradient (factor_rows, C) in ``out_dtype``: s (w small)ᵀ drop(big) of each adapter over its rows.

    big (M, C), small (M, max_rank), both with unit column stride; rows of the factor that no adapter has are zero.
    """
    C, max_rank = big.shape[1], small.shape[1]
    out = big.new_zeros(factor_rows, C, dtype=out_dtype)
    if out.numel() == 0 or big.shape[0] == 0:
        return out
    plan = rows.table, rows.scalings, rows.order, rows.bounds, rows.weights
    _multi_lora_grad_kernel[(triton.cdiv(C, t.BLOCK_C), rows.table.shape[0], triton.cdiv(max_rank, t.BLOCK_R))](
        big, small, *plan, *_dropout_arguments(rows), out, C, big.stride(0), small.stride(0),
        BLOCK_M=TILE_ROWS, BLOCK_C=t.BLOCK_C, BLOCK_R=t.BLOCK_R, PRECISION=precision(big.dtype), **t.options,
    )  # fmt: skip
    return out


__all__ = ["multi_lora_down", "multi_lora_grad", "multi_lora_linear_fwd", "multi_lora_up_"]
