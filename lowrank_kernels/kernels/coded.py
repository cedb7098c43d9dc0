"""Triton kernels that multiply by a weight of 4- or 8-bit codes, which they decode in registers.

y = x Wᵀ + bias and dX = dY W with w = rn((value(code) - zero) · scale of its block, x's dtype); see
``weights/coded.py``; with the correction of ``kernels/lora.py`` in the same accumulators. The decoded tile is the first
operand of the product, so that it goes to the matrix unit from registers: what is computed is yᵀ and dXᵀ. Accumulates
in float32 and rounds once; no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dropout_arguments, precision
from .tiles import cast, dot, dropout_keep, load_tile, store_tile, tile_position

# The numbers of weights/coded.py.
_HIGH_NIBBLE_FIRST, _INT8, _FLOAT8 = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)
_WORDS_DOWN, _WORDS_ACROSS, _Q8_0, _Q4_K = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_NESTED, _EXPONENT, _FLOAT8_SCALE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _from_float8(byte):
    """e4m3fn as float32, by integers: sign, 4 bits of exponent with bias 7, 3 bits; NaN where all 7 are set."""
    magnitude = (byte & 0x7F).to(tl.uint32)
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, (normal - 0.0078125) * 2.0, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


@triton.jit
def _block_scale(scales_ptr, map_ptr, nested_ptr, at, mask, offset, NESTED_BLOCK: tl.constexpr, SCALES: tl.constexpr):
    """The scales of blocks in float32."""
    scale = tl.load(scales_ptr + at, mask=mask, other=0)
    if SCALES == _NESTED:
        nested = tl.load(nested_ptr + at // NESTED_BLOCK, mask=mask, other=0.0)
        scale = tl.load(map_ptr + scale.to(tl.int32)) * nested + offset
    elif SCALES == _EXPONENT:
        bits = tl.where(scale == 0, 0x400000, scale.to(tl.uint32) << 23)
        scale = tl.where(scale == 255, float("nan"), bits.to(tl.uint32).to(tl.float32, bitcast=True))
    elif SCALES == _FLOAT8_SCALE:
        scale = tl.div_rn(_from_float8(scale), tl.zeros(scale.shape, tl.float32) + offset)
    return scale


@triton.jit
def _half(ptr, mask):
    """The float16 at an address of bytes, as float32."""
    low, high = tl.load(ptr, mask=mask, other=0).to(tl.uint16), tl.load(ptr + 1, mask=mask, other=0).to(tl.uint16)
    return (low | high << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _q4_k(ptr, flat, mask):
    """Elements of records of 144 bytes: halves d and m, 8 scales and 8 least values of 6 bits, 4 bits an element."""
    record = ptr + flat // 256 * 144
    block = (flat // 32 % 8).to(tl.int32)
    four = block % 4
    first, second = tl.load(record + 4 + four, mask=mask, other=0), tl.load(record + 8 + four, mask=mask, other=0)
    third = tl.load(record + 12 + four, mask=mask, other=0)
    scale = tl.where(block < 4, first & 63, third & 15 | (first >> 6) << 4).to(tl.float32)
    least = tl.where(block < 4, second & 63, third >> 4 | (second >> 6) << 4).to(tl.float32)
    byte = tl.load(record + 16 + block // 2 * 32 + flat % 32, mask=mask, other=0)
    code = tl.where(block % 2 == 0, byte & 15, byte >> 4).to(tl.float32)
    return code * (_half(record, mask) * scale) - _half(record + 2, mask) * least


@triton.jit
def _code_values(codes_ptr, values_ptr, offs_n, offs_k, mask, N, K, CODES: tl.constexpr):
    """What the codes of a tile stand for, in float32: without their scales, but for those of records."""
    flat = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    if CODES == _WORDS_DOWN:
        at = (offs_k // 8).to(tl.int64)[None, :] * N + offs_n[:, None]
        value = (tl.load(codes_ptr + at, mask=mask, other=0) >> (offs_k % 8 * 4)[None, :] & 15).to(tl.float32)
    elif CODES == _WORDS_ACROSS:
        at = offs_k.to(tl.int64)[None, :] * (N // 8) + (offs_n // 8)[:, None]
        shift = (offs_n % 8 // 2 + offs_n % 2 * 4) * 4
        value = (tl.load(codes_ptr + at, mask=mask, other=0) >> shift[:, None] & 15).to(tl.float32)
    elif CODES == _Q4_K:
        value = _q4_k(codes_ptr, flat, mask)
    elif CODES == _Q8_0:
        record = codes_ptr + flat // 32 * 34
        byte = tl.load(record + 2 + flat % 32, mask=mask, other=0)
        value = byte.to(tl.int8, bitcast=True).to(tl.float32) * _half(record, mask)
    elif CODES == _INT8:
        value = tl.load(codes_ptr + flat, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    elif CODES == _FLOAT8:
        value = _from_float8(tl.load(codes_ptr + flat, mask=mask, other=0))
    else:
        byte = tl.load(codes_ptr + flat // 2, mask=mask, other=0)
        upper = (flat % 2 == 0) == (CODES == _HIGH_NIBBLE_FIRST)
        code = tl.where(upper, byte >> 4, byte & 15)
        value = tl.load(values_ptr + code.to(tl.int32))
    return value


@triton.jit
def load_coded_tile(codes_ptr, scales_ptr, values_ptr, map_ptr, nested_ptr, zeros_ptr, groups_ptr, n0, k0, N, K,
                    offset, run, grid, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
                    NESTED_BLOCK: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, SCALE_A_ROW: tl.constexpr,
                    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """The (ROWS, COLS) tile of W at (n0, k0), decoded and rounded to DTYPE; zero outside of W.

    BLOCK_COLS 0: blocks of ``run`` elements of the flattened W. SCALE_A_ROW: each row of a tile lies in one block.
    """
    offs_n = n0 + tl.arange(0, ROWS)
    offs_k = k0 + tl.arange(0, COLS)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    value = _code_values(codes_ptr, values_ptr, offs_n, offs_k, mask, N, K, CODES)
    if scales_ptr is not None:
        rows = offs_n.to(tl.int64)[:, None]
        if SCALE_A_ROW:
            columns = k0 + tl.zeros([1], tl.int32)[None, :]
            known = (offs_n < N)[:, None] & (columns < K)
        else:
            columns = offs_k[None, :]
            known = mask
        if BLOCK_COLS == 0:
            place = (rows * K + columns) // run
        else:
            if groups_ptr is None:
                block = columns // BLOCK_COLS
            else:
                block = tl.load(groups_ptr + columns, mask=columns < K, other=0)
            if CODES == _WORDS_DOWN or CODES == _WORDS_ACROSS:
                place = block.to(tl.int64) * N + rows
            else:
                place = rows // BLOCK_ROWS * grid + block
        if zeros_ptr is not None:
            value -= tl.load(zeros_ptr + place, mask=known, other=0).to(tl.float32)
        value *= _block_scale(scales_ptr, map_ptr, nested_ptr, place, known, offset, NESTED_BLOCK, SCALES)
    return cast(tl.where(mask, value, 0.0), DTYPE)


@triton.jit
def _gated(tile, gate_ptr, factor, r0, R, BLOCK_R: tl.constexpr):
    """tile (rows, BLOCK_R) ∘ gate times a number, rounded to the tile's dtype."""
    if gate_ptr is not None:
        offs_r = r0 + tl.arange(0, BLOCK_R)
        factor *= tl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    return cast(tile.to(tl.float32) * factor, tile.dtype)


@triton.jit(do_not_specialize=["M", "threshold_bits"])
def _coded_product_kernel(
    in_ptr, codes_ptr, scales_ptr, values_ptr, map_ptr, nested_ptr, zeros_ptr, groups_ptr, bias_ptr, out_ptr,
    p_ptr, down_ptr, up_ptr, gate_ptr, seed_ptr, scale_ptr, u_ptr,
    M, N, K, R, stride_in, stride_down, stride_up, offset, run, grid, scaling, threshold_bits, keep_scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, SCALE_A_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, GRAD: tl.constexpr,
    STORE_P: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_M, BLOCK_W) tile a program of y = g ∘ u + bias, u = x Wᵀ + s (P ∘ gate) Bᵀ, P = drop(x) Aᵀ; or with
    GRAD of dX = (g ∘ dY) W + drop'(s (Q ∘ gate) A).

    No ``p_ptr``: no correction. ``down_ptr``, A: P is made beside the sum (R <= BLOCK_R), and the first column of
    programs writes it where STORE_P; else P, and in dX Q, is given. ``up_ptr``: B (N, R), in dX A (R, K). No
    ``scale_ptr``: g is 1. W comes in tiles of (BLOCK_W, BLOCK_W).
    Grid: (cdiv(M, BLOCK_M) · cdiv(columns of the result, BLOCK_W),).
    """
    dtype: tl.constexpr = in_ptr.dtype.element_ty
    columns = K if GRAD else N
    inner = N if GRAD else K
    pid_m, pid_c = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(columns, BLOCK_W), GROUP_M)
    m0, c0 = pid_m * BLOCK_M, pid_c * BLOCK_W
    acc = tl.zeros([BLOCK_W, BLOCK_M], dtype=tl.float32)
    acc_p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    if GRAD and p_ptr is not None:
        # First, while the accumulator holds nothing else: it alone is masked and scaled.
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            q = _gated(load_tile(p_ptr, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False), gate_ptr, 1.0, r0, R, BLOCK_R)
            a = cast(load_tile(up_ptr, r0, c0, R, K, stride_up, 1, BLOCK_R, BLOCK_W, False), dtype)
            acc = dot(a.T, q.T, acc, PRECISION)
        acc = acc * (scaling * keep_scale)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), m0, c0, threshold_bits, BLOCK_M, BLOCK_W)
            acc = tl.where(keep.T, acc, 0.0)
    for r0 in range(0, inner, BLOCK_W):
        n0, k0 = (r0, c0) if GRAD else (c0, r0)
        w = load_coded_tile(
            codes_ptr,
            scales_ptr,
            values_ptr,
            map_ptr,
            nested_ptr,
            zeros_ptr,
            groups_ptr,
            n0,
            k0,
            N,
            K,
            offset,
            run,
            grid,
            BLOCK_ROWS,
            BLOCK_COLS,
            NESTED_BLOCK,
            CODES,
            SCALES,
            SCALE_A_ROW,
            dtype,
            BLOCK_W,
            BLOCK_W,
        )
        rows = load_tile(in_ptr, m0, r0, M, inner, stride_in, 1, BLOCK_M, BLOCK_W, False)
        if GRAD and scale_ptr is not None:
            offs_n = r0 + tl.arange(0, BLOCK_W)
            scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)
            rows = cast(rows.to(tl.float32) * scale[None, :], dtype)
        acc = dot(w.T if GRAD else w, rows.T, acc, PRECISION)
        if down_ptr is not None:
            if DROPOUT:
                keep = dropout_keep(tl.load(seed_ptr), m0, r0, threshold_bits, BLOCK_M, BLOCK_W)
                rows = cast(tl.where(keep, rows, 0.0), dtype)
            a = cast(load_tile(down_ptr, 0, r0, R, K, stride_down, 1, BLOCK_R, BLOCK_W, False), dtype)
            acc_p = dot(rows, a.T, acc_p, PRECISION)

    offs_c = c0 + tl.arange(0, BLOCK_W)
    if not GRAD:
        if down_ptr is not None:
            p = cast(acc_p * keep_scale, dtype)
            if STORE_P and pid_c == 0:
                store_tile(p_ptr, p, m0, 0, M, R, R, 1, BLOCK_M, BLOCK_R, False)
            b = cast(load_tile(up_ptr, c0, 0, N, R, stride_up, 1, BLOCK_W, BLOCK_R, False), dtype)
            acc = dot(b, _gated(p, gate_ptr, scaling, 0, R, BLOCK_R).T, acc, PRECISION)
        elif p_ptr is not None:
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                p = load_tile(p_ptr, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R, False)
                b = cast(load_tile(up_ptr, c0, r0, N, R, stride_up, 1, BLOCK_W, BLOCK_R, False), dtype)
                acc = dot(b, _gated(p, gate_ptr, scaling, r0, R, BLOCK_R).T, acc, PRECISION)
        if scale_ptr is not None:
            if u_ptr is not None:
                store_tile(u_ptr, acc.T, m0, c0, M, N, N, 1, BLOCK_M, BLOCK_W, False)
            acc *= tl.load(scale_ptr + offs_c, mask=offs_c < N, other=0.0)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_c, mask=offs_c < columns, other=0.0).to(tl.float32)[:, None]
    store_tile(out_ptr, acc.T, m0, c0, M, columns, columns, 1, BLOCK_M, BLOCK_W, False)


class CodedOperand(NamedTuple):
    """A coded weight as the kernels take it: bytes or words, and the numbers of ``weights/coded.py``."""

    codes: Tensor
    scales: Tensor | None
    values: Tensor | None
    nested: tuple[Tensor, Tensor] | None
    zeros: Tensor | None
    groups: Tensor | None
    shape: tuple[int, int]
    code: int
    scale: int
    offset: float
    run: int
    block: tuple[int, int]
    nested_block: int


class Correction(NamedTuple):
    """What is added to a product with W in its accumulators.

    Attributes:
        p: P (M, R), or in dX Q; contiguous.
        up: B (N, R), or in dX A (R, K); adjacent columns.
        down: A, where the kernel makes P itself; ``p`` is then written if ``store_p``.
        block_r: ranks that are added at a time, of all of them with ``down``.
    """

    p: Tensor
    up: Tensor
    block_r: int
    scaling: float
    gate: Tensor | None = None
    down: Tensor | None = None
    store_p: bool = False
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None


def coded_product(
    rows: Tensor,
    w: CodedOperand,
    bias: Tensor | None = None,
    *,
    grad: bool = False,
    correction: Correction | None = None,
    column_scale: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias, or with ``grad`` dY W, in one launch; ``rows`` is a matrix with adjacent columns.

    With a correction the formulas of ``kernels/lora.py``; ``column_scale`` (N,) float32 multiplies the sum before the
    bias, or dY (DoRA), and ``u`` receives the sum.
    """
    M, (N, K) = rows.shape[0], w.shape
    wide, (block_rows, block_cols) = rows.dtype == torch.float32, w.block
    columns = K if grad else N
    out = rows.new_empty(M, columns)
    # No matrix unit at full float32 precision, and a scale for each element where blocks do not fit: smaller tiles keep
    # in registers.
    length = w.run or (64 if block_cols >= K else block_cols)
    in_rows = (not w.run or K % w.run == 0) and w.groups is None
    block_w = 64 if in_rows and length % 32 == 0 and not wide else 32
    most = 32 if wide else 64 if w.code == _Q4_K.value else 128
    block_m = min(most, max(16, triton.next_power_of_2(M)))
    one_block = in_rows and length % block_w == 0
    many_scales = block_w == 64 and not one_block and w.scales is not None
    eight_warps = (w.code not in (_INT8.value, _FLOAT8.value) and block_m * block_w == 128 * 64) or many_scales
    codes = w.codes if w.codes.dtype == torch.int32 else w.codes.view(torch.uint8)
    scales = w.scales if w.scales is None or w.scale == 0 else w.scales.view(torch.uint8)
    decoding = codes, scales, w.values, *(w.nested or (None, None)), w.zeros, w.groups
    p = down = up = gate = None
    scaling, store_p, block_r, rank, seed, keep = 1.0, False, 16, 0, None, (0, 1.0)
    if correction is not None:
        p, up, block_r, scaling, gate, down, store_p, *dropped = correction
        rank = p.shape[1]
        seed, *keep = dropout_arguments(*dropped)
    strides = rows.stride(0), 0 if down is None else down.stride(0), 0 if up is None else up.stride(0)
    _coded_product_kernel[(triton.cdiv(M, block_m) * triton.cdiv(columns, block_w),)](
        *(rows, *decoding, bias, out, p, down, up, gate, seed, column_scale, u),
        *(M, N, K, rank, *strides, w.offset, w.run, 0 if w.run else triton.cdiv(K, block_cols), scaling, *keep),
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=0 if w.run else block_cols,
        NESTED_BLOCK=w.nested_block,
        CODES=w.code,
        SCALES=w.scale,
        SCALE_A_ROW=one_block,
        BLOCK_M=block_m,
        BLOCK_W=block_w,
        BLOCK_R=block_r,
        GROUP_M=8,
        GRAD=grad,
        STORE_P=store_p,
        DROPOUT=seed is not None,
        PRECISION=precision(rows.dtype),
        num_warps=8 if eight_warps else 4,
        num_stages=2,
        enable_fp_fusion=False,  # a double quantisation's scale is rounded twice
    )
    return out
