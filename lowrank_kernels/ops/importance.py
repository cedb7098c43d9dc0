"""``lowrank_kernels::lora_importance``: record, check, plan, backends, fake. Its result is a constant to autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..cpp import cpp
from ..kernels.importance_tiles import importance_tiles
from ..kernels.target import Target
from ..reference.importance import lora_importance_ref
from ..weights import Weight, dense
from ..weights import rows as weight_rows
from .library import define
from .operands import backend_error, factor, floats_error, scaling_error, unit_columns
from .planning import Choosing, Plan, Planner

DIMS = ("rows", "columns")
_UNPACKED_AT_ONCE = 1 << 19  # elements of a W that is not dense


class LoRAImportance(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.lora_importance`."""

    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scaling: float
    dim: str
    backend: str


def check_lora_importance(call: LoRAImportance) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, weight = "lora_importance", call.weight
    factors = {name: getattr(call, name) for name in ("lora_a", "lora_b", "grad_a", "grad_b")}
    error = floats_error(op, weight=weight, **factors)
    if error is not None:
        return error
    if weight.dim() != 2:
        return ValueError(f"{op}: expected weight of shape (N, K), got {tuple(weight.shape)}")
    (n, k), r = weight.shape, call.lora_a.shape[0] if call.lora_a.dim() == 2 else "R"
    for name, tensor in factors.items():
        letters, shape = ("(R, K)", (r, k)) if name.endswith("_a") else ("(N, R)", (n, r))
        if tensor.shape != shape:
            wanted = f"({shape[0]}, {shape[1]})"
            return ValueError(f"{op}: expected {name} of shape {letters} = {wanted}, got {tuple(tensor.shape)}")
        if tensor.device != weight.device:
            return ValueError(f"{op}: expected {name} on {weight.device} like weight, got {tensor.device}")
    if r == 0:
        return ValueError(f"{op}: expected a rank of at least 1, got lora_a of shape {tuple(call.lora_a.shape)}")
    if call.dim not in DIMS:
        return ValueError(f"{op}: expected dim to be one of {', '.join(DIMS)}, got {call.dim!r}")
    return scaling_error(op, call.scaling, weight.dtype) or backend_error(op, call.backend)


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    weight = call.weight
    c = Choosing("lora_importance", weight, target)
    settled = c.settled("lora_importance", tuned.factor_sizes(weight.shape, call.lora_a.shape))
    backend = c.backend(call.backend, *settled)
    if weight.empty:
        backend = c.take("backend", "reference", "rule: nothing to read")
    elif weight.format != "dense":
        c.take("by_rows", True, f"rule: {weight.format} weights are read in blocks of dense rows")
    if backend == "triton":
        summed = weight.shape if call.dim == "rows" else weight.shape[::-1]
        c.take("tiles", importance_tiles(c.target, *summed), f"rule: processors of {c.target.arch}")
    return c.done()


plan_lora_importance = Planner("lora_importance", LoRAImportance, _decide, check_lora_importance)


def _importance(call: LoRAImportance, plan: Plan | None) -> Tensor:
    plan = plan or plan_lora_importance.known(call)
    if plan.by_rows:
        return _by_rows(call)
    if plan.backend == "reference":
        return plain_lora_importance(call)
    weight, *factors, scaling, dim, _ = call
    assert isinstance(weight, Tensor)
    if plan.backend == "triton":
        from ..kernels.importance import lora_importance

        a, b, grad_a, grad_b = (t.float() if t.dtype == torch.float64 else t for t in factors)
        if dim == "rows":
            return lora_importance(weight, a, b, grad_a, grad_b, scaling, plan.tiles)
        return lora_importance(weight.T, b.T, a.T, grad_b.T, grad_a.T, scaling, plan.tiles)
    by_row = dim == "rows"
    if weight.stride(1) != 1 and weight.stride(0) == 1:  # Wᵀ is read as it lies, and its factors are Bᵀ and Aᵀ
        a, b, grad_a, grad_b = factors
        weight, factors, by_row = weight.T, [b.T, a.T, grad_b.T, grad_a.T], not by_row
    sums: Tensor = cpp.importance_sums(unit_columns(weight), *map(factor, factors), scaling, by_row)
    return sums


def _by_rows(call: LoRAImportance) -> Tensor:
    """The sums of a W that is not dense, some of its rows at a time."""
    n, k = call.weight.shape
    step = max(1, _UNPACKED_AT_ONCE // k)
    parts = []
    for start in range(0, n, step):
        own = slice(start, min(n, start + step))
        dense_rows = weight_rows(call.weight, own.start, own.stop)
        parts.append(
            _importance(call._replace(weight=dense_rows, lora_b=call.lora_b[own], grad_b=call.grad_b[own]), None)
        )
    return torch.cat(parts) if call.dim == "rows" else torch.stack(parts).sum(0)


def plain_lora_importance(call: LoRAImportance) -> Tensor:
    """The formula as PyTorch's operations."""
    factors = call[1:5]
    return lora_importance_ref(dense(call.weight), *factors, scaling=call.scaling, dim=call.dim)


def _fake(call: LoRAImportance) -> Tensor:
    size = call.weight.shape[DIMS.index(call.dim)]
    return call.lora_a.new_empty(size, dtype=torch.promote_types(call.weight.dtype, torch.float32))


call_lora_importance = define("lora_importance", LoRAImportance, None, _importance, _fake)
