"""Triton kernels of SVFT: rows times a sparse matrix or its transpose, and its gradient at its own places."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ordered_sum
from .tiles import cast

TOKENS = 1024
"""Tokens that one program sums a gradient over; of more, the parts are added up in order."""
_BLOCK_M, _BLOCK_C = 32, 64


@triton.jit(do_not_specialize=["M", "source_at", "order_at", "starts_at"])
def _svft_multiply_kernel(
    in_ptr,
    values_ptr,
    pattern_ptr,
    out_ptr,
    M,
    C,
    source_at,
    order_at,
    starts_at,
    stride_m,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A (BLOCK_M, BLOCK_C) tile of out = in Mᵀ, or of in M with TURNED: out[m, c] = Σ_e value_e in[m, source_e].

    The values of c are those from starts[c] to starts[c + 1], with TURNED in the order by columns. Lanes of a tile walk
    their own values together, as many steps as the longest has. In float32. Grid: (cdiv(M, BLOCK_M), cdiv(C, BLOCK_C)).
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = offs_c < C
    first = tl.load(pattern_ptr + starts_at + offs_c, mask=own, other=0)
    last = tl.load(pattern_ptr + starts_at + 1 + offs_c, mask=own, other=0)
    in_rows = in_ptr + offs_m.to(tl.int64)[:, None] * stride_m
    acc = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for step in range(0, tl.max(last - first, axis=0)):
        place = first + step
        there = place < last
        if TURNED:
            place = tl.load(pattern_ptr + order_at + place, mask=there, other=0)
        value = tl.load(values_ptr + place, mask=there, other=0.0).to(tl.float32)
        source = tl.load(pattern_ptr + source_at + place, mask=there, other=0)
        mask = (offs_m < M)[:, None] & there[None, :]
        acc += value[None, :] * tl.load(in_rows + source[None, :], mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & own[None, :])


@triton.jit(do_not_specialize=["M", "E"])
def _svft_grad_kernel(
    grad_ptr,
    t_ptr,
    pattern_ptr,
    out_ptr,
    M,
    E,
    stride_gm,
    stride_tm,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dM_e = Σ_m grad[m, row_e] t[m, column_e] of BLOCK_E values over TOKENS tokens, in float32.

    Grid: (cdiv(E, BLOCK_E), cdiv(M, TOKENS)); out is (cdiv(M, TOKENS), E).
    """
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    own = offs_e < E
    row = tl.load(pattern_ptr + offs_e, mask=own, other=0)
    column = tl.load(pattern_ptr + E + offs_e, mask=own, other=0)
    first = tl.program_id(1) * TOKENS
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for m0 in range(first, min(first + TOKENS, M), BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & own[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + rows * stride_gm + row[None, :], mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + rows * stride_tm + column[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += grad * t
    tl.store(out_ptr + tl.program_id(1) * E + offs_e, tl.sum(acc, axis=0), mask=own)


def svft_multiply(rows: Tensor, values: Tensor, pattern: Tensor, width: int, turned: bool) -> Tensor:
    """rows (M, J) Mᵀ: (M, I), or with ``turned`` rows (M, I) M: (M, J), in rows' dtype. One launch.

    Args:
        rows: adjacent columns.  values: (E,), adjacent, no float64.  pattern: of ``svft_pattern``.  width: I or J.
    """
    (M, other), count = rows.shape, len(values)
    out = rows.new_empty(M, width)
    starts = 3 * count + (other + 1 if turned else 0)
    _svft_multiply_kernel[(triton.cdiv(M, _BLOCK_M), triton.cdiv(width, _BLOCK_C))](
        rows,
        values,
        pattern,
        out,
        M,
        width,
        0 if turned else count,
        2 * count,
        starts,
        rows.stride(0),
        TURNED=turned,
        BLOCK_M=_BLOCK_M,
        BLOCK_C=_BLOCK_C,
        num_warps=4,
    )
    return out


def svft_grad(grad: Tensor, t: Tensor, pattern: Tensor, count: int) -> Tensor:
    """dM (E,) float32 from ds (M, I) and t (M, J), both with adjacent columns. One launch, two beyond TOKENS tokens."""
    M, splits = len(t), triton.cdiv(len(t), TOKENS)
    out = t.new_empty(count, dtype=torch.float32)
    partial = out if splits == 1 else t.new_empty(splits, count, dtype=torch.float32)
    _svft_grad_kernel[(triton.cdiv(count, _BLOCK_C), splits)](
        grad,
        t,
        pattern,
        partial,
        M,
        count,
        grad.stride(0),
        t.stride(0),
        TOKENS=TOKENS,
        BLOCK_M=_BLOCK_M,
        BLOCK_E=_BLOCK_C,
        num_warps=4,
    )
    return out if splits == 1 else ordered_sum(partial, out)
