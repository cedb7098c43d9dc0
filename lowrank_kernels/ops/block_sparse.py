"""``lowrank_kernels::block_sparse_linear``, ``block_sparse_weight_grad`` and ``block_adamw_``: schema to autocast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..cpp import cpp
from ..kernels.block_sparse_tiles import block_grad_tiles
from ..kernels.target import Target
from ..reference.block_sparse import (
    block_adamw_ref_,
    block_sparse_linear_ref,
    block_sparse_weight_grad_ref,
    read_blocks_ref,
    write_blocks_ref_,
)
from ..weights import Weight, dense, grad_product, product
from .backend import KERNEL_DTYPES, automatic
from .library import SymInt, Written, define, define_in_place, define_trained, unobserved
from .lora import cast_products, rows_in, wanted
from .operands import (
    as_rows,
    backend_error,
    count_error,
    device_error,
    flag_error,
    floats_error,
    frozen_error,
    like_rows_of,
    number_error,
    product_error,
    unit_columns,
    vector_error,
)
from .planning import Choosing, Plan, Planner


class BlockSparseWeightGrad(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.block_sparse_weight_grad`. ``dtype``: of the gradient."""

    x: Tensor
    grad_y: Tensor
    block_index: Tensor
    bm: int
    bn: int
    dtype: torch.dtype
    backend: str


class BlockSparseLinear(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.functional.block_sparse_linear`.

    Attributes:
        columns, width: the column blocks of x that the backward needs, and how many columns these are.
        save: x, or those columns of it, are kept for the backward.
    """

    x: Tensor
    weight: Weight
    blocks: Tensor
    block_index: Tensor
    bias: Tensor | None
    columns: Tensor | None
    width: SymInt
    save: bool
    rewrite: bool
    backend: str


class BlockSparseLinearResults(NamedTuple):
    """``saved``: the chosen columns of x."""

    y: Tensor
    saved: Tensor | None


class BlockSparseLinearBackward(NamedTuple):
    """Arguments of the backward. ``needs``: the gradients wanted, of (x, blocks, bias)."""

    grad_y: Tensor
    x: Tensor | None
    weight: Weight
    block_index: Tensor
    columns: Tensor | None
    bm: int
    bn: int
    blocks_dtype: torch.dtype
    needs: tuple[bool, ...]
    backend: str


class BlockSparseLinearGradients(NamedTuple):
    x: Tensor | None
    blocks: Tensor | None
    bias: Tensor | None


class BlockAdamW(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.functional.block_adamw_`."""

    blocks: Written
    grad: Tensor
    exp_avg: Written
    exp_avg_sq: Written
    weight: Written
    block_index: Tensor
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    seed: Tensor | None
    backend: str


def check_block_size(op: str, block_size: Any) -> tuple[int, int]:
    """(bm, bn) from what a user gives: one number or two, each a positive multiple of 16."""
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or any(isinstance(b, bool) or not isinstance(b, int) or b < 16 or b % 16 for b in pair)
    ):
        raise ValueError(
            f"{op}: expected block_size to be a positive multiple of 16, or a pair of them, got {block_size!r}"
        )
    return pair[0], pair[1]


def _shape_error(op: str, blocks: Tensor) -> Exception | None:
    """The error of blocks that are not (n_blocks, bm, bn) with sides that are multiples of 16."""
    if blocks.dim() == 3 and all(side and side % 16 == 0 for side in blocks.shape[1:]):
        return None
    return ValueError(
        f"{op}: expected blocks of shape (n_blocks, bm, bn), bm and bn multiples of 16, got {tuple(blocks.shape)}"
    )


def block_index_error(op: str, block_index: Any, block_size: tuple[int, int], shape: Sequence[int]) -> Exception | None:
    """The error of an index of another form, and, where its values are at hand, of blocks out of range or twice there.

    The values of an index on a GPU are not read: that would wait for the device.
    """
    if not isinstance(block_index, Tensor):
        return TypeError(f"{op}: expected block_index to be a tensor, got {type(block_index).__name__}")
    if block_index.dtype != torch.int32:
        return TypeError(f"{op}: expected block_index of dtype torch.int32, got {block_index.dtype}")
    if block_index.dim() != 2 or block_index.shape[1] != 2:
        return ValueError(f"{op}: expected block_index of shape (n_blocks, 2), got {tuple(block_index.shape)}")
    if torch.compiler.is_compiling() or type(block_index) is not Tensor or block_index.device.type != "cpu":
        return None
    (n, k), (bm, bn) = shape, block_size
    rows, columns = -(-n // bm), -(-k // bn)
    seen = set()
    for i, j in block_index.tolist():
        if not (0 <= i < rows and 0 <= j < columns):
            return ValueError(
                f"{op}: expected block_index within the {rows} × {columns} blocks of {bm}×{bn} of a weight of shape "
                f"({n}, {k}), got block ({i}, {j})"
            )
        if (i, j) in seen:
            return ValueError(f"{op}: expected block_index with every block once, got block ({i}, {j}) more than once")
        seen.add((i, j))
    return None


def _count_error(op: str, block_index: Tensor, count: int) -> Exception | None:
    if block_index.shape == (count, 2):
        return None
    return ValueError(
        f"{op}: expected block_index of shape (n_blocks, 2) = ({count}, 2), got {tuple(block_index.shape)}"
    )


def check_block_sparse_weight_grad(call: BlockSparseWeightGrad) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, (x, grad_y, block_index) = "block_sparse_weight_grad", call[:3]
    error = backend_error(op, call.backend) or floats_error(op, x=x, grad_y=grad_y)
    if error is not None:
        return error
    for name, letter, tensor in (("x", "K", x), ("grad_y", "N", grad_y)):
        if tensor.dim() == 0:
            return ValueError(f"{op}: expected {name} of shape (..., {letter}), got ()")
    if x.shape[:-1] != grad_y.shape[:-1]:
        return ValueError(
            f"{op}: expected x and grad_y of the same leading shape, got {tuple(x.shape)} and {tuple(grad_y.shape)}"
        )
    if x.dtype != grad_y.dtype:
        return TypeError(f"{op}: expected x and grad_y of one dtype, got {x.dtype} and {grad_y.dtype}")
    shape = grad_y.shape[-1], x.shape[-1]
    return block_index_error(op, block_index, (call.bm, call.bn), shape) or device_error(
        op, x, grad_y=grad_y, block_index=block_index
    )


def check_block_sparse_linear(call: BlockSparseLinear) -> Exception | None:
    """The error of operands that do not fit together; with ``columns``, the index counts as checked."""
    op, (x, weight, blocks, block_index, bias) = "block_sparse_linear", call[:5]
    error = (
        floats_error(op, x=x, weight=weight, blocks=blocks) or product_error(op, x, weight) or _shape_error(op, blocks)
    )
    if error is None and call.columns is None:
        error = block_index_error(op, block_index, (blocks.shape[1], blocks.shape[2]), weight.shape)
    return (
        error
        or _count_error(op, block_index, blocks.shape[0])
        or vector_error(op, "bias", "N", bias, weight.shape[0], x.device)
        or device_error(op, x, weight=weight, blocks=blocks, block_index=block_index)
        or frozen_error(op, x, weight, ": its blocks train")
        or backend_error(op, call.backend)
        or flag_error(op, "rewrite", call.rewrite)
    )


def check_block_adamw(call: BlockAdamW) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, seed = "block_adamw_", call.seed
    blocks, grad, exp_avg, exp_avg_sq, weight, block_index = call[:6]
    moments, rates = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, ("lr", "eps", "weight_decay")
    error = (
        backend_error(op, call.backend)
        or count_error(op, "step", call.step, 1)
        or next(filter(None, (number_error(op, name, getattr(call, name), 0.0) for name in rates)), None)
        or number_error(op, "betas", call.beta1, 0.0, 1.0)
        or number_error(op, "betas", call.beta2, 0.0, 1.0)
        or floats_error(op, weight=weight, blocks=blocks, grad=grad, **moments)
        or _shape_error(op, blocks)
    )
    if error is not None:
        return error
    for name, tensor in (("weight", weight), ("grad", grad), *moments.items()):
        if tensor.device != blocks.device:
            return ValueError(f"{op}: expected {name} and blocks on one device, got {tensor.device}")
    if weight.dim() != 2:
        return ValueError(f"{op}: expected weight of shape (N, K), got {tuple(weight.shape)}")
    state = torch.promote_types(blocks.dtype, torch.float32)
    for name, tensor in (("grad", grad), *moments.items()):
        if tensor.shape != blocks.shape:
            return ValueError(f"{op}: expected {name} of shape {tuple(blocks.shape)}, got {tuple(tensor.shape)}")
        if name != "grad" and tensor.dtype != state:
            return TypeError(f"{op}: expected {name} of dtype {state}, got {tensor.dtype}")
    for name, tensor in (("blocks", blocks), *moments.items()):
        if not tensor.is_contiguous():
            return ValueError(f"{op}: expected {name} to be contiguous, got strides {tensor.stride()}")
    error = block_index_error(op, block_index, (blocks.shape[1], blocks.shape[2]), weight.shape)
    if error is not None or seed is None:
        return error or _count_error(op, block_index, len(blocks))
    if not (isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.numel() == 1):
        return TypeError(f"{op}: expected seed to be an int64 scalar tensor or None, got {seed!r:.60}")
    if blocks.dtype != torch.bfloat16:
        return TypeError(f"{op}: expected bfloat16 blocks for stochastic rounding, got {blocks.dtype}")
    return _count_error(op, block_index, len(blocks))


# --------------------------------------------------------------------------------------------------------------- plan


def _decide_grad(call: Any, records: bool, target: Target | None) -> Plan:
    x, grad_y, size = call.x, call.grad_y, (call.bm, call.bn)
    c = Choosing("block_sparse_weight_grad", x, target)
    blocks = call.block_index.shape[0]
    fields, source = c.settled("block_sparse_weight_grad", tuned.block_sizes(x.rows, blocks, size))
    backend = c.backend(call.backend, fields, source)
    if x.empty or grad_y.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    elif backend == "triton":
        x, grad_y = x.as_operand(), grad_y.as_operand()
        aligned = x.describable and grad_y.describable
        tiles = block_grad_tiles(c.target, x.shape[0], blocks, *size, x.dtype, aligned=aligned, settled=fields)
        c.take("tiles", tiles, source if fields and aligned else f"rule: {c.target.arch}")
    return c.done()


def _decide_linear(call: Any, records: bool, target: Target | None) -> Plan:
    c = Choosing("block_sparse_linear", call.x, target)
    c.backend(call.backend, {}, "")
    c.take("base", "library", "rule: the blocks are inside the weight")
    return c.done()


def _decide_adamw(call: Any, records: bool, target: Target | None) -> Plan:
    weight = call.weight
    c = Choosing("block_adamw_", call.blocks, target)
    backend = c.backend(call.backend, {}, "")
    if backend == "cpu" and weight.shape[1] > 1 and weight.stride[1] != 1:
        if call.backend == "cpu":
            raise ValueError(
                f"block_adamw_: expected a weight with adjacent columns (stride 1) for backend 'cpu', got strides "
                f"{tuple(weight.stride)}; use backend='auto'"
            )
        c.take("backend", "reference", "rule: the extension takes weights with adjacent columns")
    return c.done()


_plan_grad = Planner("block_sparse_weight_grad", BlockSparseWeightGrad, _decide_grad)
_plan_linear = Planner("block_sparse_linear", BlockSparseLinear, _decide_linear)
_plan_adamw = Planner("block_adamw_", BlockAdamW, _decide_adamw)


# ----------------------------------------------------------------------------------------------------------- backends


def _weight_grad(call: BlockSparseWeightGrad, plan: Plan | None) -> Tensor:
    plan = plan or _plan_grad.known(call)
    x, grad_y, block_index, bm, bn, dtype, _ = call
    x, grad_y, size = as_rows(x), as_rows(grad_y), (bm, bn)
    if plan.backend == "reference":
        return block_sparse_weight_grad_ref(x, grad_y, block_index, size, dtype)
    if dtype == torch.float64:  # float64 blocks over a narrower weight: kernels sum in float32
        return _weight_grad(call._replace(dtype=torch.float32), plan).to(dtype)
    x, grad_y, block_index = unit_columns(x), unit_columns(grad_y), block_index.contiguous()
    if plan.backend == "cpu":
        out = x.new_empty(len(block_index), *size, dtype=dtype)
        cpp.block_grad_(out, x, grad_y, block_index)
        return out
    from ..kernels.block_sparse import block_grad

    return block_grad(x, grad_y, block_index, size, dtype, plan.tiles)


def _take_columns(x: Tensor, columns: Tensor, bn: int, width: int) -> Tensor:
    """The column blocks ``columns`` of x (M, K), side by side in a storage of their own: (M, width)."""
    rows, k = x.shape
    if k % bn == 0:
        return x.reshape(rows, k // bn, bn).index_select(1, columns).reshape(rows, width)
    # The last block is narrower; columns are ascending, so it is the last one here too.
    elements = (columns.long()[:, None] * bn + torch.arange(bn, device=x.device)).reshape(-1)[:width]
    return x.index_select(1, elements)


def _forward(call: BlockSparseLinear, plan: Plan | None) -> BlockSparseLinearResults:
    x, weight, blocks, _, bias, columns, width, save, _, _ = call
    rows = as_rows(x)
    if (plan or _plan_linear.known(call)).backend == "reference":
        y = block_sparse_linear_ref(rows, dense(weight), bias)
    else:
        y = product(rows, weight, bias)
    saved = None if not save or columns is None else _take_columns(rows, columns, blocks.shape[2], width)
    return BlockSparseLinearResults(like_rows_of(x, y), saved)


def _backward(call: BlockSparseLinearBackward, plan: Plan | None) -> BlockSparseLinearGradients:
    grad_y, x, weight, block_index, columns, bm, bn, dtype, needs, backend = call
    need_x, need_blocks, need_bias = needs
    rows, grad_blocks = as_rows(grad_y), None
    if need_blocks:
        assert x is not None
        if columns is not None:
            # x holds the chosen column blocks alone: a block's column is its place among them.
            place = torch.searchsorted(columns, block_index[:, 1].contiguous(), out_int32=True)
            block_index = torch.stack((block_index[:, 0], place), 1)
        of_blocks = BlockSparseWeightGrad(as_rows(x), rows, block_index, bm, bn, dtype, backend)
        grad_blocks = _weight_grad(of_blocks, None)
    return BlockSparseLinearGradients(
        grad_product(grad_y, weight) if need_x else None, grad_blocks, rows.sum(0) if need_bias else None
    )


def _adamw(call: BlockAdamW, plan: Plan | None) -> None:
    plan = plan or _plan_adamw.known(call)
    blocks, grad, exp_avg, exp_avg_sq, weight, block_index, lr, beta1, beta2, eps, weight_decay, step, seed, _ = call
    tensors = blocks, grad.contiguous(), exp_avg, exp_avg_sq, weight, block_index.contiguous()
    if plan.backend == "cpu":
        corrected = lr / (1.0 - beta1**step), beta1, beta2, eps, 1.0 - lr * weight_decay, math.sqrt(1.0 - beta2**step)
        cpp.block_adamw_step_(*tensors, *corrected, seed)
        return
    options: dict[str, Any] = {
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": weight_decay,
        "step": step,
        "seed": seed,
    }
    if plan.backend == "reference":
        block_adamw_ref_(*tensors, **options)
        return
    from ..kernels.block_sparse import block_adamw_

    block_adamw_(*tensors, **options)


def read_blocks(weight: Tensor, block_index: Tensor, block_size: tuple[int, int]) -> Tensor:
    """As ``reference.read_blocks_ref``."""
    return read_blocks_ref(weight, block_index, block_size)


def write_blocks_(weight: Tensor, blocks: Tensor, block_index: Tensor) -> Tensor:
    """W[block] ← blocks, rounded to W's dtype, in place; what sticks out of W is left out. One kernel where there is
    one for such tensors, else as ``reference.write_blocks_ref_``. Raises no version counter."""
    adjacent = blocks.is_contiguous() and block_index.is_contiguous() and weight.numel() > 0 and blocks.numel() > 0
    kernels = weight.dtype in KERNEL_DTYPES and blocks.dtype in KERNEL_DTYPES
    if adjacent and kernels and unobserved((weight, blocks, block_index)):
        name, _ = automatic("write_blocks_", weight.device.type, weight.dtype)
        if name == "cpu" and weight.stride(1) == 1:
            cpp.write_blocks_(weight, blocks, block_index)
            return weight
        if name == "triton":
            from ..kernels import block_sparse

            block_sparse.write_blocks_(weight, blocks, block_index)
            return weight
    return write_blocks_ref_(weight, blocks, block_index)


# ------------------------------------------------------------------------------------------- registration with torch


def _weight_grad_fake(call: BlockSparseWeightGrad) -> Tensor:
    return call.x.new_empty(call.block_index.shape[0], call.bm, call.bn, dtype=call.dtype)


def _forward_fake(call: BlockSparseLinear) -> BlockSparseLinearResults:
    x = call.x
    saved = x.new_empty(rows_in(x), call.width) if call.save and call.columns is not None else x.new_empty(0)
    return BlockSparseLinearResults(x.new_empty(*x.shape[:-1], call.weight.shape[0]), saved)


def _backward_fake(call: BlockSparseLinearBackward) -> BlockSparseLinearGradients:
    grad_y = call.grad_y
    n, k = call.weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k),
        grad_y.new_empty(call.block_index.shape[0], call.bm, call.bn, dtype=call.blocks_dtype),
        grad_y.new_empty(n),
    )
    return BlockSparseLinearGradients(*wanted(shapes, call.needs, grad_y))


def _keep(call: BlockSparseLinear, results: BlockSparseLinearResults) -> dict[str, Any]:
    x = call.x if call.columns is None else results.saved
    kept = {"x": x if call.save else None, "bm": call.blocks.shape[1], "bn": call.blocks.shape[2]}
    return kept | {"ahead": call.blocks if call.rewrite else None}


def _rewrite(kept: dict[str, Any]) -> None:
    """Write the blocks into W again, which was gathered anew since the forward."""
    if kept["ahead"] is not None:
        write_blocks_(kept["weight"].data, kept["ahead"].detach(), kept["block_index"])


call_block_sparse_weight_grad = define(
    "block_sparse_weight_grad", BlockSparseWeightGrad, None, _weight_grad, _weight_grad_fake
)
call_block_sparse_linear = define_trained(
    "block_sparse_linear",
    BlockSparseLinear,
    BlockSparseLinearResults,
    BlockSparseLinearBackward,
    BlockSparseLinearGradients,
    forward=(_forward, _forward_fake),
    backwards=(_backward, _backward_fake),
    keep=_keep,
    ahead=_rewrite,
    autocast=cast_products,
)
call_block_adamw_ = define_in_place("block_adamw_", BlockAdamW, _adamw)
