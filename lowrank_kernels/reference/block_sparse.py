"""Sparse Matrix Tuning, as the formulas say (arXiv 2405.15525): gradients and steps of chosen blocks of W."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import philox_words_ref


class BlockSparseGradients(NamedTuple):
    """Gradients of :func:`block_sparse_linear_ref`; None where not asked for."""

    x: Tensor | None
    blocks: Tensor | None
    bias: Tensor | None


def _positions(shape: torch.Size, block_index: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, ...]:
    """(row, column) in W of every element of the blocks, (n, bm, 1) and (n, 1, bn), and (row, column) within a block.

    A block that sticks out of W has its last row or column there repeated instead.
    """
    places, within = [], []
    for axis, (size, length) in enumerate(zip(block_size, shape, strict=True)):
        start = block_index[:, axis].long()[:, None] * size
        inside = torch.arange(size, device=block_index.device).minimum(length - 1 - start)
        places.append(start + inside)
        within.append(inside)
    (rows, columns), (i, j) = places, within
    return rows[:, :, None], columns[:, None, :], i[:, :, None], j[:, None, :]


def read_blocks_ref(weight: Tensor, block_index: Tensor, block_size: tuple[int, int]) -> Tensor:
    """The blocks of W (N, K) at ``block_index`` (n, 2), as (n, bm, bn); zero where a block sticks out of W."""
    rows, columns, i, j = _positions(weight.shape, block_index, block_size)
    bm, bn = block_size
    there = (i == torch.arange(bm, device=i.device)[:, None]) & (j == torch.arange(bn, device=j.device))
    return torch.where(there, weight[rows, columns], 0)


@torch.no_grad()
def write_blocks_ref_(weight: Tensor, blocks: Tensor, block_index: Tensor) -> Tensor:
    """W[block] ← blocks, rounded to W's dtype, in place; what sticks out of W is left out."""
    bm, bn = blocks.shape[1:]
    rows, columns, i, j = _positions(weight.shape, block_index, (bm, bn))
    n = torch.arange(len(blocks), device=blocks.device)[:, None, None]
    # The repeated rows and columns of a ragged block are written more than once, with the same values.
    weight[rows, columns] = blocks[n, i, j].to(weight.dtype)
    return weight


def with_blocks_ref(weight: Tensor, blocks: Tensor, block_index: Tensor) -> Tensor:
    """A copy of W with the blocks in it, rounded to its dtype; differentiable in both."""
    bm, bn = blocks.shape[1:]
    rows, columns, i, j = _positions(weight.shape, block_index, (bm, bn))
    there = (i == torch.arange(bm, device=i.device)[:, None]) & (j == torch.arange(bn, device=j.device))
    places = tuple(t.expand(there.shape)[there] for t in (rows, columns))
    return weight.index_put(places, blocks[there].to(weight.dtype))


def block_sparse_weight_grad_ref(
    x: Tensor, grad_y: Tensor, block_index: Tensor, block_size: tuple[int, int], dtype: torch.dtype | None = None
) -> Tensor:
    """dW_b = dY[:, rows of b]ᵀ x[:, columns of b] for every block b, summed over all tokens.

    Half-precision operands are widened to float32, and a result is rounded once; float64 stays float64.

    Args:
        x: (..., K).  grad_y: (..., N).  block_index: (n, 2), (row block, column block).  block_size: (bm, bn).
        dtype: of the result; default x's.

    Returns:
        (n, bm, bn), zero where a block sticks out of (N, K).
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[:-1].numel()
    x2, dy = x.reshape(tokens, x.shape[-1]).to(acc), grad_y.reshape(tokens, grad_y.shape[-1]).to(acc)
    bm, bn = block_size
    out = x.new_zeros(len(block_index), bm, bn, dtype=dtype or x.dtype)
    for b, (i, j) in enumerate(block_index.tolist()):
        rows, columns = dy[:, i * bm : (i + 1) * bm], x2[:, j * bn : (j + 1) * bn]
        out[b, : rows.shape[1], : columns.shape[1]] = rows.T @ columns
    return out


def block_sparse_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias with the tuned blocks inside W. x (..., K), weight (N, K), bias (N,)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.to(acc) @ weight.to(acc).T
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def block_sparse_linear_backward_ref(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    block_index: Tensor,
    block_size: tuple[int, int],
    *,
    dtype: torch.dtype | None = None,
    needs: tuple[bool, ...] = (True, True, True),
) -> BlockSparseGradients:
    """dX = dY W, dW_b as :func:`block_sparse_weight_grad_ref`, dbias = Σ_m dY.

    Args:
        x: needed for the blocks alone.
        dtype: of the blocks' gradient; default grad_y's.
        needs: which of (x, blocks, bias) to compute.
    """
    acc = torch.promote_types(grad_y.dtype, torch.float32)
    need_x, need_blocks, need_bias = needs
    wide = grad_y.to(acc)
    grad_x = (wide @ weight.to(acc)).to(grad_y.dtype) if need_x else None
    grad_blocks = None
    if need_blocks:
        assert x is not None
        grad_blocks = block_sparse_weight_grad_ref(x, grad_y, block_index, block_size, dtype)
    grad_bias = wide.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1]).sum(0).to(grad_y.dtype) if need_bias else None
    return BlockSparseGradients(grad_x, grad_blocks, grad_bias)


def stochastic_bfloat16_ref(values: Tensor, seed: Tensor) -> Tensor:
    """float32 (n, …) rounded to bfloat16, up with the probability of the part that is cut off.

    The lower 16 bits of word(seed, row, column) of :func:`philox_words_ref` are added to the float32 bits, which are
    then cut; a row is one block, a column an element of it. NaN stays NaN.
    """
    rows = values.reshape(values.shape[0], -1)
    words = philox_words_ref(seed, *rows.shape).reshape(values.shape)
    bits = (values.contiguous().view(torch.int32).long() & 0xFFFFFFFF) + (words & 0xFFFF)
    cut = (bits >> 16).to(torch.int32)
    return torch.where(values.isnan(), values, (cut << 16).view(torch.float32)).to(torch.bfloat16)


@torch.no_grad()
def block_adamw_ref_(
    blocks: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    block_index: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    seed: Tensor | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on packed blocks, and the blocks into W. In place.

    m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g²,
    p ← (1 - lr λ) p - lr m̂ / (√v̂ + ε), m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ); W[block] ← p.

    Args:
        blocks, grad: (n, bm, bn).  exp_avg, exp_avg_sq: the same shape, float32 (float64 over float64 blocks).
        weight: (N, K).  block_index: (n, 2).
        step: t, from 1.
        seed: int64 scalar tensor: bfloat16 blocks are rounded stochastically, with the words of
            :func:`stochastic_bfloat16_ref`; None: to nearest.
    """
    acc = torch.promote_types(blocks.dtype, torch.float32)
    g, p = grad.to(acc), blocks.to(acc)
    exp_avg.lerp_(g, 1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
    corrected = exp_avg_sq.sqrt() / math.sqrt(1.0 - betas[1] ** step) + eps
    p = p * (1.0 - lr * weight_decay) - (lr / (1.0 - betas[0] ** step)) * exp_avg / corrected
    blocks.copy_(p if seed is None else stochastic_bfloat16_ref(p, seed))
    write_blocks_ref_(weight, blocks, block_index)
