"""``lowrank_kernels::frozen_linear``: the product with a frozen weight of any format, and its gradient for x."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.target import Target
from ..weights import Weight, dense, grad_product, product
from .library import define_trained
from .lora import cast_products, wanted
from .operands import (
    as_rows,
    backend_error,
    device_error,
    floats_error,
    frozen_error,
    like_rows_of,
    product_error,
    vector_error,
)
from .planning import Choosing, Plan, Planner


class FrozenLinear(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.functional.frozen_linear`."""

    x: Tensor
    weight: Weight
    bias: Tensor | None
    backend: str


class FrozenLinearBackward(NamedTuple):
    """Arguments of the backward. ``needs``: the gradients wanted, of (x, bias)."""

    grad_y: Tensor
    weight: Weight
    needs: tuple[bool, ...]
    backend: str


class FrozenLinearGradients(NamedTuple):
    x: Tensor | None
    bias: Tensor | None


def check_frozen_linear(call: FrozenLinear) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, (x, weight, bias, backend) = "frozen_linear", call
    return (
        floats_error(op, x=x, weight=weight)
        or product_error(op, x, weight)
        or device_error(op, x, weight=weight)
        or vector_error(op, "bias", "N", bias, weight.shape[0], x.device)
        or frozen_error(op, x, weight)
        or backend_error(op, backend)
    )


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    rows = call.x if hasattr(call, "x") else call.grad_y
    c = Choosing("frozen_linear", rows, target)
    c.backend(call.backend, {}, "")
    if rows.empty or call.weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    else:
        c.take("base", "library", f"rule: {call.weight.format} weights multiply by themselves")
    return c.done()


plan_frozen_linear = Planner("frozen_linear", FrozenLinear, _decide, check_frozen_linear)
_plan_backward = Planner("frozen_linear_backward", FrozenLinearBackward, _decide)


def _forward(call: FrozenLinear, plan: Plan | None) -> Tensor:
    x, weight, bias, _ = call
    rows = as_rows(x)
    if (plan or plan_frozen_linear.known(call)).backend == "reference":
        wide = torch.promote_types(x.dtype, torch.float32)
        y = rows.to(wide) @ dense(weight).to(wide).T
        y = (y if bias is None else y + bias.to(wide)).to(x.dtype)
    else:
        y = product(rows, weight, bias)
    return like_rows_of(x, y)


def _backward(call: FrozenLinearBackward, plan: Plan | None) -> FrozenLinearGradients:
    grad_y, weight, (need_x, need_bias), _ = call
    rows, grad_x = as_rows(grad_y), None
    if need_x and (plan or _plan_backward.known(call)).backend == "reference":
        wide = torch.promote_types(grad_y.dtype, torch.float32)
        grad_x = like_rows_of(grad_y, (rows.to(wide) @ dense(weight).to(wide)).to(grad_y.dtype))
    elif need_x:
        grad_x = like_rows_of(grad_y, grad_product(rows, weight))
    return FrozenLinearGradients(grad_x, rows.sum(0) if need_bias else None)


def _forward_fake(call: FrozenLinear) -> Tensor:
    return call.x.new_empty(*call.x.shape[:-1], call.weight.shape[0])


def _backward_fake(call: FrozenLinearBackward) -> FrozenLinearGradients:
    grad_y, (n, k) = call.grad_y, call.weight.shape
    shapes = grad_y.new_empty(*grad_y.shape[:-1], k), grad_y.new_empty(n)
    return FrozenLinearGradients(*wanted(shapes, call.needs, grad_y))


call_frozen_linear = define_trained(
    "frozen_linear",
    FrozenLinear,
    None,
    FrozenLinearBackward,
    FrozenLinearGradients,
    forward=(_forward, _forward_fake),
    backwards=(_backward, _backward_fake),
    keep=lambda call, results: {},
    autocast=cast_products,
)
