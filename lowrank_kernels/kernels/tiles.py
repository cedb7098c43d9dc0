"""Pieces that every kernel of the package is made of: tile loads, dot products, program order, dropout bits."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, decided, as Triton does, when kernels are defined."""

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if _INTERPRETED:
        # The interpreter holds bfloat16 as raw 16-bit integers and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest even."""
    if _INTERPRETED and DTYPE == tl.bfloat16 and x.dtype == tl.float32:
        # The interpreter cuts float32 off to bfloat16, with twice the error of the rounding that devices do.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def load_tile(src, row0, col0, num_rows, num_cols, stride_row, stride_col,
              ROWS: tl.constexpr, COLS: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """The (ROWS, COLS) tile of a matrix at (row0, col0), zero outside of it.

    ``src`` is a tensor descriptor with that block shape when USE_TMA, else a pointer.
    """
    if USE_TMA:
        return src.load([row0, col0])
    else:  # the compiler reads on after a return, so the other branch must be one
        offs_row = row0 + tl.arange(0, ROWS)
        offs_col = col0 + tl.arange(0, COLS)
        # Rows and columns past the edge must read as zero: they take part in the dot products.
        mask = (offs_row < num_rows)[:, None] & (offs_col < num_cols)[None, :]
        ptrs = src + offs_row.to(tl.int64)[:, None] * stride_row + offs_col.to(tl.int64)[None, :] * stride_col
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(dst, tile, row0, col0, num_rows, num_cols, stride_row, stride_col,
               ROWS: tl.constexpr, COLS: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """Write a (ROWS, COLS) tile, rounded to the destination's dtype, without what lies past the edge."""
    if USE_TMA:
        dst.store([row0, col0], cast(tile, dst.dtype))
    else:
        offs_row = row0 + tl.arange(0, ROWS)
        offs_col = col0 + tl.arange(0, COLS)
        mask = (offs_row < num_rows)[:, None] & (offs_col < num_cols)[None, :]
        ptrs = dst + offs_row.to(tl.int64)[:, None] * stride_row + offs_col.to(tl.int64)[None, :] * stride_col
        tl.store(ptrs, cast(tile, dst.dtype.element_ty), mask=mask)


@triton.jit
def tile_position(tile, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of a tile, walking GROUP_M row tiles together so that they share column operands in L2."""
    tiles_in_group = GROUP_M * num_pid_n
    first_pid_m = (tile // tiles_in_group) * GROUP_M
    group_size = min(num_pid_m - first_pid_m, GROUP_M)
    pid_m = first_pid_m + (tile % tiles_in_group) % group_size
    pid_n = (tile % tiles_in_group) // group_size
    return pid_m, pid_n


@triton.jit
def dropout_keep(seed, row0, col0, threshold_bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Keep mask of the (ROWS, COLS) tile at (row0, col0); see ``dropout_keep_rows``."""
    return dropout_keep_rows(seed, row0 + tl.arange(0, ROWS), col0, threshold_bits, COLS)


@triton.jit
def dropout_keep_rows(seed, rows, col0, threshold_bits, COLS: tl.constexpr):
    """Keep mask of COLS columns of the rows named: Philox-4x32-10 on (seed, row, column); see ``reference/dropout.py``.

    One Philox call gives four neighbouring columns, so col0 and COLS are multiples of 4.
    ``threshold_bits`` is the uint32 threshold carried in an int32 (one kernel signature for every p).
    """
    group = (col0 // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    row = rows.to(tl.uint32)[:, None]
    zero = tl.zeros([rows.shape[0], COLS // 4], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + group, zero + row, zero, zero)
    # Compared before they are interleaved, so that one byte an element changes hands between threads and not four.
    threshold = threshold_bits.to(tl.uint32, bitcast=True)
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    # join puts its operands last: (w0, w2) and (w1, w3) interleave to w0, w1, w2, w3.
    return tl.reshape(tl.join(even, odd), [rows.shape[0], COLS])


@triton.jit
def _ordered_sum_kernel(partial_ptr, out_ptr, tail_ptr, count, out_numel, numel, BLOCK: tl.constexpr):
    """Σ_s partial[s, i] for s = 0, 1, …, count - 1 in that order: the same bits at every run.

    Grid: (cdiv(numel, BLOCK),). partial is float32 (count, numel); the first out_numel sums go to out, what is left of
    them to tail (None where nothing is), each of any float dtype.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    ptrs = partial_ptr + offs
    for _ in range(count):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += numel
    tl.store(out_ptr + offs, cast(acc, out_ptr.dtype.element_ty), mask=offs < out_numel)
    if tail_ptr is not None:
        tail = cast(acc, tail_ptr.dtype.element_ty)
        tl.store(tail_ptr + (offs - out_numel), tail, mask=mask & (offs >= out_numel))
