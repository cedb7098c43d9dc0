"""What the public functions compute inside torch.func transforms and forward-mode differentiation.

The formulas of ``reference``, called as PyTorch's operations with autograd above them: right under every transform, at
the price of memory and time. See :func:`~lowrank_kernels.ops.library.transformed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.block_sparse import block_sparse_linear_ref, block_sparse_weight_grad_ref, with_blocks_ref
from ..reference.dora import dora_column_scale_ref, dora_linear_ref, dora_weight_norm_ref
from ..reference.lora import lora_linear_ref
from ..reference.multi_lora import multi_lora_linear_ref


def plain_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, gate: Tensor | None, scaling: float,
    dropout_p: float, dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    y, _ = lora_linear_ref(
        x, weight, lora_a, lora_b, bias, scaling=scaling, gate=gate, dropout_p=dropout_p, dropout_seed=dropout_seed
    )
    return y


def plain_weight_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    norm = dora_weight_norm_ref(weight, lora_a, lora_b, scaling=scaling)
    return norm.to(torch.promote_types(weight.dtype, torch.float32))


def plain_column_scale(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, g, ‖W_i‖²), constants of every transform."""
    weight, lora_a, lora_b, magnitude = (t.detach() for t in (weight, lora_a, lora_b, magnitude))
    norm = plain_weight_norm(weight, lora_a, lora_b, scaling)
    return norm, dora_column_scale_ref(magnitude, norm), weight.to(norm.dtype).square().sum(1)


def plain_dora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor | None, scaling: float,
    dropout_p: float, dropout_seed: Tensor | None, dropout_base: bool, detach_norm: bool, norm: Tensor | None,
) -> Tensor:  # fmt: skip
    """``norm``: n where it is given; g follows from it and the magnitude."""
    if norm is None:
        a, b = (lora_a.detach(), lora_b.detach()) if detach_norm else (lora_a, lora_b)
        norm = plain_weight_norm(weight, a, b, scaling)
    y, _, _ = dora_linear_ref(
        x, weight, lora_a, lora_b, dora_column_scale_ref(magnitude, norm), bias,
        scaling=scaling, dropout_p=dropout_p, dropout_seed=dropout_seed, dropout_base=dropout_base,
    )  # fmt: skip
    return y


def plain_block_sparse_linear(
    x: Tensor, weight: Tensor, blocks: Tensor, block_index: Tensor, bias: Tensor | None
) -> Tensor:
    """With the blocks put into W here, so that they have derivatives."""
    return block_sparse_linear_ref(x, with_blocks_ref(weight, blocks, block_index), bias)


def plain_block_sparse_weight_grad(
    x: Tensor, grad_y: Tensor, block_index: Tensor, block_size: tuple[int, int]
) -> Tensor:
    return block_sparse_weight_grad_ref(x, grad_y, block_index, block_size)


def plain_multi_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, bias: Tensor | None,
    table: Tensor, scalings: Tensor, slices: Sequence[int] | None, adapter_ids: Tensor, weights: Tensor | None,
    norm: Tensor | None, dropout_p: Tensor | None, dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    scale = None if magnitude is None or norm is None else dora_column_scale_ref(magnitude, norm)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y, _, _ = multi_lora_linear_ref(
        rows, weight, lora_a, lora_b, table, scalings, adapter_ids, bias,
        slices=slices, weights=weights, column_scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], weight.shape[0])
