"""``lowrank_kernels::svft_linear``: pattern, record, check, plan, backends, fakes, autograd, autocast.

The products with W, V and U are the library's; what is between them, with the sparse M alone, is a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..cpp import cpp
from ..kernels.target import Target
from ..reference.svft import svft_linear_backward_ref, svft_linear_ref
from ..weights import Weight, dense, grad_product, product
from ..weights.dense import library_reads_past_rows
from .library import define_trained
from .lora import cast_products, empty_factor, in_dtype_of, rows_in, wanted
from .operands import (
    as_rows,
    backend_error,
    device_error,
    floats_error,
    frozen_error,
    like_rows_of,
    product_error,
    vector,
    vector_error,
)
from .planning import Choosing, Plan, Planner


class SVFTLinear(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.svft_linear`. ``save_t``: t = x V is kept for the backward."""

    x: Tensor
    weight: Weight
    u: Tensor
    vh: Tensor
    values: Tensor
    pattern: Tensor
    bias: Tensor | None
    save_t: bool
    backend: str


class SVFTLinearResults(NamedTuple):
    y: Tensor
    t: Tensor | None


class SVFTLinearBackward(NamedTuple):
    """Arguments of the backward. ``needs``: the gradients wanted, of (x, values, bias)."""

    grad_y: Tensor
    weight: Weight
    u: Tensor
    vh: Tensor
    values: Tensor
    pattern: Tensor
    t: Tensor | None
    needs: tuple[bool, ...]
    backend: str


class SVFTLinearGradients(NamedTuple):
    x: Tensor | None
    values: Tensor | None
    bias: Tensor | None


def svft_pattern(index: Any, rows: int, columns: int) -> Tensor:
    """The places of a sparse matrix M (I, J) as kernels read them, made once for all calls.

    Args:
        index: (2, E) integers, the row and the column of each value, ascending by row, then column, each place once.
        rows, columns: I and J.

    Returns:
        int32, on ``index``'s device, one after another: the row of each value; its column; the values by column, then
        row; and where each row, and then each column of the sorted values, begins, with the end: 3 E + I + J + 2.

    Raises:
        TypeError, ValueError: no integers, another shape, places out of range, out of order or there twice.
    """
    op = "svft_pattern"
    for name, count in (("rows", rows), ("columns", columns)):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 2**31:
            raise ValueError(f"{op}: expected {name} to be an integer from 1 to 2147483647, got {count!r:.60}")
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{op}: expected index to be a tensor of integers, got {got}")
    if index.dim() != 2 or index.shape[0] != 2 or not index.shape[1] or index.is_meta:
        raise ValueError(f"{op}: expected index of shape (2, E), E at least 1, got {tuple(index.shape)} {index.device}")
    row, column = index.long()
    place = row * columns + column
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    if not bool(inside.all()):
        raise ValueError(f"{op}: expected index with places within M of shape ({rows}, {columns}), got some outside")
    if not bool((place.diff() > 0).all()):
        raise ValueError(f"{op}: expected index with places ascending by row, then column, each once")
    by_column = torch.argsort(column, stable=True)
    row_starts = torch.searchsorted(row, torch.arange(rows + 1, device=index.device))
    column_starts = torch.searchsorted(column[by_column], torch.arange(columns + 1, device=index.device))
    return torch.cat([row, column, by_column, row_starts, column_starts]).to(torch.int32)


def check_svft_linear(call: SVFTLinear) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, (x, weight, u, vh, values, pattern) = "svft_linear", call[:6]
    error = floats_error(op, x=x, weight=weight, u=u, vh=vh, values=values) or product_error(op, x, weight)
    if error is not None:
        return error
    n, k = weight.shape
    if u.dim() != 2 or u.shape[0] != n or not u.shape[1]:
        return ValueError(f"{op}: expected u of shape (N, I) = ({n}, I), I at least 1, got {tuple(u.shape)}")
    if vh.dim() != 2 or vh.shape[1] != k or not vh.shape[0]:
        return ValueError(f"{op}: expected vh of shape (J, K) = (J, {k}), J at least 1, got {tuple(vh.shape)}")
    if values.dim() != 1 or not values.shape[0]:
        return ValueError(f"{op}: expected values of shape (E,), E at least 1, got {tuple(values.shape)}")
    if not isinstance(pattern, Tensor) or pattern.dtype != torch.int32:
        got = pattern.dtype if isinstance(pattern, Tensor) else type(pattern).__name__
        return TypeError(f"{op}: expected pattern to be what svft_pattern returned, an int32 tensor, got {got}")
    size = 3 * values.shape[0] + u.shape[1] + vh.shape[0] + 2
    if pattern.shape != (size,) or not pattern.is_contiguous():
        return ValueError(
            f"{op}: expected pattern of shape ({size},), what svft_pattern returns for {values.shape[0]} values of M "
            f"(I, J) = ({u.shape[1]}, {vh.shape[0]}), got {tuple(pattern.shape)}"
        )
    for name, t in (("u", u), ("vh", vh)):
        if t.requires_grad and torch.is_grad_enabled():
            return ValueError(f"{op}: expected a frozen {name}, got one that requires grad; call requires_grad_(False)")
    return (
        device_error(op, x, weight=weight, u=u, vh=vh, values=values, pattern=pattern)
        or vector_error(op, "bias", "N", call.bias, n, x.device)
        or frozen_error(op, x, weight)
        or backend_error(op, call.backend)
    )


# --------------------------------------------------------------------------------------------------------------- plan


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    x, weight = call.x, call.weight
    c = Choosing("svft_linear", x, target)
    sizes = tuned.product_sizes(x.shape, weight.shape) | {"E": call.values.shape[0]}
    c.backend(call.backend, *c.settled("svft_linear", sizes))
    if x.empty or weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    return c.done()


def _decide_backward(call: Any, records: bool, target: Target | None) -> Plan:
    c = Choosing("svft_linear", call.grad_y, target)
    c.backend(call.backend, {}, "")
    if call.grad_y.empty or call.weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    return c.done()


plan_svft_linear = Planner("svft_linear", SVFTLinear, _decide, check_svft_linear)
_plan_backward = Planner("svft_linear_backward", SVFTLinearBackward, _decide_backward)


# ----------------------------------------------------------------------------------------------------------- backends


def _index(pattern: Tensor, values: Tensor) -> Tensor:
    """(2, E) of a pattern."""
    return pattern[: 2 * len(values)].view(2, -1)


def _multiply(backend: str, rows: Tensor, values: Tensor, pattern: Tensor, width: int, turned: bool) -> Tensor:
    """rows Mᵀ (M, I), or with ``turned`` rows M (M, J), in rows' dtype; ``width``: I or J."""
    if backend == "cpu":
        made: Tensor = cpp.svft_multiply(rows, values, pattern, width, turned)
        return made
    from ..kernels.svft import svft_multiply

    return svft_multiply(rows, values, pattern, width, turned)


def _add_product_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y += x Wᵀ."""
    if library_reads_past_rows(x.dtype, x.device.type, weight.shape[1]):
        return y.add_(product(x, weight))
    return y.addmm_(x, weight.T)


def _forward(call: SVFTLinear, plan: Plan | None) -> SVFTLinearResults:
    plan = plan or plan_svft_linear.known(call)
    x, weight, u, vh, values, pattern, bias, save_t, _ = call
    rows = as_rows(x)
    t: Tensor
    if plan.backend == "reference":
        y, t = svft_linear_ref(rows, dense(weight), u, vh, values, _index(pattern, values), bias)
    else:
        t = product(rows, in_dtype_of(rows, vh))
        y = product(rows, weight, bias)
        _add_product_(y, _multiply(plan.backend, t, _read(values), pattern, u.shape[1], False), in_dtype_of(rows, u))
    return SVFTLinearResults(like_rows_of(x, y), t if save_t else None)


def _read(values: Tensor) -> Tensor:
    """M's values as kernels read them."""
    read = vector(values)
    assert read is not None
    return read


def _backward(call: SVFTLinearBackward, plan: Plan | None) -> SVFTLinearGradients:
    plan = plan or _plan_backward.known(call)
    grad_y, weight, u, vh, values, pattern, t, needs, _ = call
    need_x, need_values, need_bias = needs
    rows = as_rows(grad_y)
    if plan.backend == "reference":
        grad_x, grad_values, grad_bias = svft_linear_backward_ref(
            rows, dense(weight), u, vh, values, _index(pattern, values), t, needs=needs
        )
        return SVFTLinearGradients(None if grad_x is None else like_rows_of(grad_y, grad_x), grad_values, grad_bias)
    grad_x = grad_values = None
    if need_x or need_values:
        ds = grad_product(rows, in_dtype_of(rows, u))
        if need_values:
            assert t is not None
            grad_values = _grad_values(plan.backend, ds, t, values, pattern)
        if need_x:
            grad_x = grad_product(rows, weight)
            back = _multiply(plan.backend, ds, _read(values), pattern, len(vh), True)
            grad_x = like_rows_of(grad_y, _add_product_(grad_x, back, in_dtype_of(rows, vh).T))
    return SVFTLinearGradients(grad_x, grad_values, rows.sum(0) if need_bias else None)


def _grad_values(backend: str, ds: Tensor, t: Tensor, values: Tensor, pattern: Tensor) -> Tensor:
    """dM_ij = Σ ds_i t_j over tokens, at the places of the pattern alone, summed in float32."""
    if backend == "cpu":
        made: Tensor = cpp.svft_grad(ds, t, pattern, len(values))
        return made.to(values.dtype)
    from ..kernels.svft import svft_grad

    return svft_grad(ds, t, pattern, len(values)).to(values.dtype)


# ------------------------------------------------------------------------------------------- registration with torch


def _forward_fake(call: SVFTLinear) -> SVFTLinearResults:
    x = call.x
    y = x.new_empty(*x.shape[:-1], call.weight.shape[0])
    return SVFTLinearResults(y, x.new_empty(rows_in(x), call.vh.shape[0]) if call.save_t else x.new_empty(0))


def _backward_fake(call: SVFTLinearBackward) -> SVFTLinearGradients:
    grad_y = call.grad_y
    n, k = call.weight.shape
    shapes = grad_y.new_empty(*grad_y.shape[:-1], k), empty_factor(call.values), grad_y.new_empty(n)
    return SVFTLinearGradients(*wanted(shapes, call.needs, grad_y))


def _keep(call: SVFTLinear, results: SVFTLinearResults) -> dict[str, Any]:
    return {"t": results.t if call.save_t else None}


def plain_svft_linear(call: SVFTLinear) -> Tensor:
    """The formula as PyTorch's operations, for transforms of torch.func."""
    index = _index(call.pattern, call.values)
    return svft_linear_ref(call.x, dense(call.weight), call.u, call.vh, call.values, index, call.bias)[0]


call_svft_linear = define_trained(
    "svft_linear",
    SVFTLinear,
    SVFTLinearResults,
    SVFTLinearBackward,
    SVFTLinearGradients,
    forward=(_forward, _forward_fake),
    backwards=(_backward, _backward_fake),
    keep=_keep,
    autocast=cast_products,
)
