"""``lowrank_kernels::block_sparse_linear``, ``block_sparse_weight_grad`` and ``block_adamw_``: schema to autocast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import tuned
from ..reference.block_sparse import (
    block_adamw_ref_,
    block_sparse_linear_ref,
    block_sparse_weight_grad_ref,
    read_blocks_ref,
    write_blocks_ref_,
)
from .backend import KERNEL_DTYPES, automatic, resolve_backend
from .library import define, define_in_place, no_double_backward, unobserved
from .lora import library_grad, library_linear, rows_in
from .operands import as_rows, check_optional_vector, is_empty, like_rows_of, unit_columns

_GRAD = (
    "block_sparse_weight_grad(Tensor x, Tensor grad_y, Tensor block_index, int bm, int bn, ScalarType dtype, "
    "str backend) -> Tensor"
)
_FORWARD = (
    "block_sparse_linear(Tensor x, Tensor weight, Tensor blocks, Tensor block_index, Tensor? bias, Tensor? columns, "
    "SymInt width, bool save, bool rewrite, str backend) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "block_sparse_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor block_index, Tensor? columns, "
    "int bm, int bn, ScalarType dtype, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)
_ADAMW = (
    "block_adamw_(Tensor(a!) blocks, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) weight, "
    "Tensor block_index, float lr, float beta1, float beta2, float eps, float weight_decay, int step, Tensor? seed, "
    "str backend) -> ()"
)
Needs = tuple[bool, bool, bool]
"""Which of the gradients of (x, blocks, bias) to compute."""


def check_block_size(op: str, block_size: Any) -> tuple[int, int]:
    """(bm, bn) from what a user gives: one number or two, each a positive multiple of 16."""
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    if (
        not isinstance(pair, (tuple, list)) or len(pair) != 2
        or any(isinstance(b, bool) or not isinstance(b, int) or b < 16 or b % 16 for b in pair)
    ):  # fmt: skip
        raise ValueError(
            f"{op}: expected block_size to be a positive multiple of 16, or a pair of them, got {block_size!r}"
        )
    return pair[0], pair[1]


def check_block_shape(op: str, blocks: Tensor) -> tuple[int, int]:
    """(bm, bn) of blocks (n_blocks, bm, bn)."""
    try:
        return check_block_size(op, tuple(blocks.shape[1:]))
    except ValueError:
        raise ValueError(
            f"{op}: expected blocks of shape (n_blocks, bm, bn), bm and bn multiples of 16, got {tuple(blocks.shape)}"
        ) from None


def check_block_index(op: str, block_index: Any, block_size: tuple[int, int], shape: tuple[int, int]) -> None:
    """Raise for an index of another form, and, where its values are at hand, for blocks out of range or twice there.

    The values of an index on a GPU are not read: that would wait for the device.
    """
    if not isinstance(block_index, Tensor):
        raise TypeError(f"{op}: expected block_index to be a tensor, got {type(block_index).__name__}")
    if block_index.dtype != torch.int32:
        raise TypeError(f"{op}: expected block_index of dtype torch.int32, got {block_index.dtype}")
    if block_index.dim() != 2 or block_index.shape[1] != 2:
        raise ValueError(f"{op}: expected block_index of shape (n_blocks, 2), got {tuple(block_index.shape)}")
    if torch.compiler.is_compiling() or type(block_index) is not Tensor or block_index.device.type != "cpu":
        return
    (n, k), (bm, bn) = shape, block_size
    rows, columns = -(-n // bm), -(-k // bn)
    seen = set()
    for i, j in block_index.tolist():
        if not (0 <= i < rows and 0 <= j < columns):
            raise ValueError(
                f"{op}: expected block_index within the {rows} × {columns} blocks of {bm}×{bn} of a weight of shape "
                f"({n}, {k}), got block ({i}, {j})"
            )
        if (i, j) in seen:
            raise ValueError(f"{op}: expected block_index with every block once, got block ({i}, {j}) more than once")
        seen.add((i, j))


def _check_rows(op: str, x: Any, shape: tuple[int, ...], names: str, what: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {what} to be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: expected {what} of a floating dtype, got {x.dtype}")
    if x.dim() == 0 or (shape and x.shape[-1] != shape[0]):
        wanted = f"(..., {names}) = (..., {shape[0]})" if shape else f"(..., {names})"
        raise ValueError(f"{op}: expected {what} of shape {wanted}, got {tuple(x.shape)}")


def check_block_sparse_weight_grad(x: Tensor, grad_y: Tensor, block_index: Tensor, block_size: Any) -> tuple[int, int]:
    """(bm, bn); raise ValueError or TypeError for operands that do not fit together."""
    op = "block_sparse_weight_grad"
    _check_rows(op, x, (), "K", "x")
    _check_rows(op, grad_y, (), "N", "grad_y")
    if x.shape[:-1] != grad_y.shape[:-1]:
        raise ValueError(
            f"{op}: expected x and grad_y of the same leading shape, got {tuple(x.shape)} and {tuple(grad_y.shape)}"
        )
    if x.dtype != grad_y.dtype:
        raise TypeError(f"{op}: expected x and grad_y of one dtype, got {x.dtype} and {grad_y.dtype}")
    size = check_block_size(op, block_size)
    check_block_index(op, block_index, size, (grad_y.shape[-1], x.shape[-1]))
    for name, tensor in (("grad_y", grad_y), ("block_index", block_index)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device} like x, got {tensor.device}")
    return size


def check_block_sparse_linear(
    x: Tensor, weight: Tensor, blocks: Tensor, block_index: Tensor, bias: Tensor | None, *, values: bool
) -> None:
    """Raise ValueError or TypeError for operands that do not fit together; ``values``: of the index too."""
    op = "block_sparse_linear"
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        given = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{op}: expected weight of shape (N, K), got {given}")
    n, k = weight.shape
    _check_rows(op, x, (k,), "K", "x")
    if not isinstance(blocks, Tensor) or blocks.dim() != 3 or not blocks.is_floating_point():
        got = f"{tuple(blocks.shape)} {blocks.dtype}" if isinstance(blocks, Tensor) else type(blocks).__name__
        raise ValueError(f"{op}: expected blocks of shape (n_blocks, bm, bn) and a floating dtype, got {got}")
    check_block_shape(op, blocks)
    if values:
        check_block_index(op, block_index, (blocks.shape[1], blocks.shape[2]), (n, k))
    if block_index.shape[0] != blocks.shape[0]:
        raise ValueError(
            f"{op}: expected block_index of shape (n_blocks, 2) = ({blocks.shape[0]}, 2), "
            f"got {tuple(block_index.shape)}"
        )
    check_optional_vector(op, "bias", "N", bias, n, x.device)
    for name, tensor in (("weight", weight), ("blocks", blocks), ("block_index", block_index)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device} like x, got {tensor.device}")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{op}: expected x and weight of one dtype, got {x.dtype} and {weight.dtype}; "
            f"cast x, or run under torch.autocast"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: expected a frozen weight, got one that requires grad; "
            f"call weight.requires_grad_(False): its blocks train"
        )


# ----------------------------------------------------------------------------------------------------------- backends


def _block_grad(
    x: Tensor, grad_y: Tensor, block_index: Tensor, size: tuple[int, int], dtype: torch.dtype, op: str, backend: str
) -> Tensor:
    """dW_b from x (M, K) and dY (M, N)."""
    name = resolve_backend(op, backend, x)
    if backend == "auto":
        chosen = tuned.choice("block_sparse_weight_grad", x, tuned.block_sizes, x.shape[0], len(block_index), size)
        name = chosen if chosen == "reference" else name
    if name == "reference" or is_empty(x, grad_y):
        return block_sparse_weight_grad_ref(x, grad_y, block_index, size, dtype)
    if dtype == torch.float64:  # float64 blocks over a narrower weight: kernels sum in float32
        return _block_grad(x, grad_y, block_index, size, torch.float32, op, name).to(dtype)
    x, grad_y, block_index = unit_columns(x), unit_columns(grad_y), block_index.contiguous()
    if name == "cpu":
        out = x.new_empty(len(block_index), *size, dtype=dtype)
        torch.ops.lowrank_kernels.block_grad_(out, x, grad_y, block_index)
        return out
    from ..kernels.block_sparse import block_grad

    return block_grad(x, grad_y, block_index, size, dtype)


def _weight_grad(
    x: Tensor, grad_y: Tensor, block_index: Tensor, bm: int, bn: int, dtype: torch.dtype, backend: str
) -> Tensor:
    rows = (as_rows(x), as_rows(grad_y))
    return _block_grad(*rows, block_index, (bm, bn), dtype, "block_sparse_weight_grad", backend)


def _take_columns(x: Tensor, columns: Tensor, bn: int, width: int) -> Tensor:
    """The column blocks ``columns`` of x (M, K), side by side in a storage of their own: (M, width)."""
    rows, k = x.shape
    if k % bn == 0:
        return x.reshape(rows, k // bn, bn).index_select(1, columns).reshape(rows, width)
    # The last block is narrower; columns are ascending, so it is the last one here too.
    elements = (columns.long()[:, None] * bn + torch.arange(bn, device=x.device)).reshape(-1)[:width]
    return x.index_select(1, elements)


def _forward(
    x: Tensor, weight: Tensor, blocks: Tensor, block_index: Tensor, bias: Tensor | None, columns: Tensor | None,
    width: int, save: bool, rewrite: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    name = resolve_backend("block_sparse_linear", backend, x)
    rows = as_rows(x)
    # The blocks are inside the weight: the product is the library's, whatever else runs here.
    y = block_sparse_linear_ref(rows, weight, bias) if name == "reference" else library_linear(rows, weight, bias)
    if not save or columns is None:
        return like_rows_of(x, y), x.new_empty(0)
    return like_rows_of(x, y), _take_columns(rows, columns, blocks.shape[2], width)


def _backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, block_index: Tensor, columns: Tensor | None, bm: int, bn: int,
    dtype: torch.dtype, needs: Needs, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_blocks, need_bias = needs
    rows = as_rows(grad_y)
    grad_x = grad_blocks = grad_bias = grad_y.new_empty(0)
    if need_x:
        grad_x = library_grad(grad_y, weight)
    if need_blocks:
        assert x is not None
        if columns is not None:
            # x holds the chosen column blocks alone: a block's column is its place among them.
            place = torch.searchsorted(columns, block_index[:, 1].contiguous(), out_int32=True)
            block_index = torch.stack((block_index[:, 0], place), 1)
        grad_blocks = _block_grad(as_rows(x), rows, block_index, (bm, bn), dtype, "block_sparse_linear", backend)
    if need_bias:
        grad_bias = rows.sum(0)
    return grad_x, grad_blocks, grad_bias


def _adamw(
    blocks: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, block_index: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: Tensor | None,
    backend: str,
) -> None:  # fmt: skip
    name = resolve_backend("block_adamw_", backend, blocks)
    grad, block_index = grad.contiguous(), block_index.contiguous()
    if name == "cpu" and weight.shape[1] > 1 and weight.stride(1) != 1:
        if backend == "cpu":
            raise ValueError(
                f"block_adamw_: expected a weight with adjacent columns (stride 1) for backend 'cpu', got strides "
                f"{weight.stride()}; use backend='auto'"
            )
        name = "reference"
    if name == "reference":
        block_adamw_ref_(
            blocks, grad, exp_avg, exp_avg_sq, weight, block_index,
            lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, step=step, seed=seed,
        )  # fmt: skip
    elif name == "cpu":
        torch.ops.lowrank_kernels.block_adamw_step_(
            blocks, grad, exp_avg, exp_avg_sq, weight, block_index,
            lr / (1.0 - beta1**step), beta1, beta2, eps, 1.0 - lr * weight_decay, math.sqrt(1.0 - beta2**step), seed,
        )  # fmt: skip
    else:
        from ..kernels.block_sparse import block_adamw_

        block_adamw_(
            blocks, grad, exp_avg, exp_avg_sq, weight, block_index, lr, beta1, beta2, eps, weight_decay, step, seed
        )


def check_block_adamw(
    blocks: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, block_index: Tensor,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError for operands that do not fit together."""
    op = "block_adamw_"
    named = ("weight", weight), ("blocks", blocks), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)
    for name, tensor in named:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: expected {name} to be a tensor of a floating dtype, got {got}")
    for name, tensor in named:
        if tensor.device != blocks.device:
            raise ValueError(f"{op}: expected {name} and blocks on one device, got {tensor.device}")
    if blocks.dim() != 3:
        raise ValueError(f"{op}: expected blocks of shape (n_blocks, bm, bn), got {tuple(blocks.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight of shape (N, K), got {tuple(weight.shape)}")
    state = torch.promote_types(blocks.dtype, torch.float32)
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.shape != blocks.shape:
            raise ValueError(f"{op}: expected {name} of shape {tuple(blocks.shape)}, got {tuple(tensor.shape)}")
        if name != "grad" and tensor.dtype != state:
            raise TypeError(f"{op}: expected {name} of dtype {state}, got {tensor.dtype}")
    for name, tensor in (("blocks", blocks), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: expected {name} to be contiguous, got strides {tensor.stride()}")
    check_block_index(op, block_index, check_block_shape(op, blocks), (weight.shape[0], weight.shape[1]))
    if block_index.shape != (len(blocks), 2):
        raise ValueError(
            f"{op}: expected block_index of shape (n_blocks, 2) = ({len(blocks)}, 2), got {tuple(block_index.shape)}"
        )
    if seed is not None and not (isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.numel() == 1):
        raise TypeError(f"{op}: expected seed to be an int64 scalar tensor or None, got {seed!r:.60}")
    if seed is not None and blocks.dtype != torch.bfloat16:
        raise TypeError(f"{op}: expected bfloat16 blocks for stochastic rounding, got {blocks.dtype}")


def read_blocks(weight: Tensor, block_index: Tensor, block_size: tuple[int, int]) -> Tensor:
    """As ``reference.read_blocks_ref``."""
    return read_blocks_ref(weight, block_index, block_size)


def write_blocks_(weight: Tensor, blocks: Tensor, block_index: Tensor) -> Tensor:
    """W[block] ← blocks, rounded to W's dtype, in place; what sticks out of W is left out. One kernel where there is
    one for such tensors, else as ``reference.write_blocks_ref_``. Raises no version counter."""
    adjacent = blocks.is_contiguous() and block_index.is_contiguous() and not is_empty(weight, blocks)
    kernels = weight.dtype in KERNEL_DTYPES and blocks.dtype in KERNEL_DTYPES
    if adjacent and kernels and unobserved((weight, blocks, block_index)):
        name, _ = automatic("write_blocks_", weight.device.type, weight.dtype)
        if name == "cpu" and weight.stride(1) == 1:
            torch.ops.lowrank_kernels.write_blocks_(weight, blocks, block_index)
            return weight
        if name == "triton":
            from ..kernels import block_sparse

            block_sparse.write_blocks_(weight, blocks, block_index)
            return weight
    return write_blocks_ref_(weight, blocks, block_index)


# ------------------------------------------------------------------------------------------- registration with torch


def _weight_grad_fake(x, grad_y, block_index, bm, bn, dtype, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(block_index.shape[0], bm, bn, dtype=dtype)


def _forward_fake(x, weight, blocks, block_index, bias, columns, width, save, rewrite, backend):  # type: ignore[no-untyped-def]
    saved = x.new_empty(rows_in(x), width) if save and columns is not None else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), saved


def _backward_fake(grad_y, x, weight, block_index, columns, bm, bn, dtype, needs, backend):  # type: ignore[no-untyped-def]
    n, k = weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k), grad_y.new_empty(block_index.shape[0], bm, bn, dtype=dtype),
        grad_y.new_empty(n),
    )  # fmt: skip
    return tuple(shape if need else grad_y.new_empty(0) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, blocks, block_index, bias, columns, _, save, rewrite, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    kept = None if not save else x if columns is None else output[1]
    ctx.save_for_backward(kept, weight, block_index, columns, blocks if rewrite else None)
    ctx.size, ctx.dtype, ctx.backend = tuple(blocks.shape[1:]), blocks.dtype, backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd_backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 10
    x, weight, block_index, columns, blocks = ctx.saved_tensors
    if blocks is not None:
        write_blocks_(weight.data, blocks.detach(), block_index)
    need_x, _w, need_blocks, _i, need_bias = ctx.needs_input_grad[:5]
    needs = (need_x, need_blocks, need_bias)
    grads = _call_backward(
        grad_y, x, weight, block_index, columns,
        *ctx.size, ctx.dtype, needs, ctx.backend,
    )  # fmt: skip
    grad_x, grad_blocks, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, grad_blocks, None, grad_bias, None, None, None, None, None


def _autocast(dtype: torch.dtype, x, weight, blocks, block_index, bias, *rest):  # type: ignore[no-untyped-def]
    # Blocks keep their dtype: they are not read, and their gradient has it.
    x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    return x, weight, blocks, block_index, bias, *rest


call_block_sparse_weight_grad = define(
    _GRAD, _weight_grad, _weight_grad_fake, **no_double_backward("block_sparse_weight_grad")
)
call_block_sparse_linear = define(
    _FORWARD, _forward, _forward_fake, setup_context=_setup_context, backward=_autograd_backward, autocast=_autocast
)
_call_backward = define(_BACKWARD, _backward, _backward_fake, **no_double_backward("block_sparse_linear"))
call_block_adamw_ = define_in_place(_ADAMW, _adamw)
