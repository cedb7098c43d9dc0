"""What the public functions compute inside torch.func transforms and forward-mode differentiation.

The formulas of ``reference``, called as PyTorch's operations with autograd above them: right under every transform, at
the price of memory and time. See :func:`~lowrank_kernels.ops.library.transformed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.block_sparse import block_sparse_linear_ref, block_sparse_weight_grad_ref, with_blocks_ref
from ..reference.dora import dora_column_scale_ref, dora_linear_ref, dora_weight_norm_ref
from ..reference.lora import lora_linear_ref
from ..reference.multi_lora import multi_lora_linear_ref
from ..weights import Weight, dense, owners
from .dora import DoRALinear
from .lora import LoRALinear
from .multi_lora import MultiLoRALinear


def plain_lora_linear(call: LoRALinear) -> Tensor:
    y, _ = lora_linear_ref(
        call.x,
        dense(call.weight),
        call.lora_a,
        call.lora_b,
        call.bias,
        scaling=call.scaling,
        gate=call.gate,
        dropout_p=call.dropout_p,
        dropout_seed=call.dropout_seed,
    )
    return y


def plain_weight_norm(weight: Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    norm = dora_weight_norm_ref(dense(weight), lora_a, lora_b, scaling=scaling)
    return norm.to(torch.promote_types(weight.dtype, torch.float32))


def plain_column_scale(
    weight: Weight, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, g, ‖W_i‖²), constants of every transform."""
    w, lora_a, lora_b, magnitude = (t.detach() for t in (dense(weight), lora_a, lora_b, magnitude))
    norm = plain_weight_norm(w, lora_a, lora_b, scaling)
    return norm, dora_column_scale_ref(magnitude, norm), w.to(norm.dtype).square().sum(1)


def plain_dora_linear(call: DoRALinear) -> Tensor:
    """n is taken where it is given; g follows from it and the magnitude."""
    a, b, norm = call.lora_a, call.lora_b, call.norm
    if norm is None:
        of_norm = (a.detach(), b.detach()) if call.detach_norm else (a, b)
        norm = plain_weight_norm(call.weight, *of_norm, call.scaling)
    y, _, _ = dora_linear_ref(
        call.x, dense(call.weight), a, b, dora_column_scale_ref(call.magnitude, norm), call.bias, scaling=call.scaling,
        dropout_p=call.dropout_p, dropout_seed=call.dropout_seed, dropout_base=call.dropout_base,
    )  # fmt: skip
    return y


def plain_block_sparse_linear(
    x: Tensor, weight: Weight, blocks: Tensor, block_index: Tensor, bias: Tensor | None
) -> Tensor:
    """With the blocks put into W here, so that they have derivatives."""
    return block_sparse_linear_ref(x, with_blocks_ref(dense(weight), blocks, block_index), bias)


def plain_block_sparse_weight_grad(
    x: Tensor, grad_y: Tensor, block_index: Tensor, block_size: tuple[int, int]
) -> Tensor:
    return block_sparse_weight_grad_ref(x, grad_y, block_index, block_size)


def plain_multi_lora_linear(call: MultiLoRALinear) -> Tensor:
    scale = None
    if call.magnitude is not None and call.norm is not None:
        scale = dora_column_scale_ref(call.magnitude, call.norm)
    x = call.x
    y, _, _ = multi_lora_linear_ref(
        x.reshape(x.shape[:-1].numel(), x.shape[-1]), dense(call.weight), call.lora_a, call.lora_b, call.table,
        call.scalings, call.adapter_ids, call.bias, slices=call.slices, weights=call.weights, column_scale=scale,
        dropout_p=call.dropout_p, dropout_seed=call.dropout_seed, experts=owners(call.weight, x.shape[:-1].numel()),
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], call.weight.shape[0])
