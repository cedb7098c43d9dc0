"""``lowrank_kernels::galore_adam_``: record, check, plan, backends. It writes W and moments, and has no gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..cpp import cpp
from ..kernels.target import Target
from ..reference.galore import galore_adam_ref
from .library import Written, define_in_place
from .operands import backend_error, count_error, factor, floats_error, number_error, unit_columns
from .planning import Choosing, Plan, Planner


class GaLoreAdam(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.galore_adam_`."""

    weight: Written
    grad: Tensor
    basis: Tensor
    exp_avg: Written
    exp_avg_sq: Written
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    step: int
    backend: str


def _overlaps(t: Tensor) -> bool:
    return t.numel() > 0 and any(s > 1 and stride == 0 for s, stride in zip(t.shape, t.stride(), strict=True))


def check_galore_rates(call: GaLoreAdam) -> Exception | None:
    """The error of numbers out of their range, which differ from call to call; None where there is none."""
    op = "galore_adam_"
    return (
        count_error(op, "step", call.step, 1)
        or number_error(op, "lr", call.lr, 0.0)
        or number_error(op, "eps", call.eps, 0.0)
        or number_error(op, "weight_decay", call.weight_decay, 0.0)
        or number_error(op, "scale", call.scale, 0.0)
        or number_error(op, "betas", call.beta1, 0.0, 1.0)
        or number_error(op, "betas", call.beta2, 0.0, 1.0)
    )


def check_galore_adam(call: GaLoreAdam) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, (weight, grad, basis, exp_avg, exp_avg_sq) = "galore_adam_", call[:5]
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    others = {"grad": grad, "basis": basis, **moments}
    error = backend_error(op, call.backend) or floats_error(op, weight=weight, **others)
    if error is not None:
        return error
    if weight.dim() != 2:
        return ValueError(f"{op}: expected weight of shape (N, K), got {tuple(weight.shape)}")
    (n, k), r = weight.shape, basis.shape[1] if basis.dim() == 2 else 1
    shapes = {"grad": ("(N, K)", (n, k)), "basis": ("(N, R)", (n, r))}
    for name, tensor in others.items():
        letters, shape = shapes.get(name, ("(R, K)", (r, k)))
        if tensor.shape != shape:
            wanted = f"({shape[0]}, {shape[1]})"
            return ValueError(f"{op}: expected {name} of shape {letters} = {wanted}, got {tuple(tensor.shape)}")
        if tensor.device != weight.device:
            return ValueError(f"{op}: expected {name} on {weight.device} like weight, got {tensor.device}")
    if not 1 <= r <= max(n, 1):
        return ValueError(f"{op}: expected basis with 1 to N = {n} columns, got {r}")
    state = torch.promote_types(weight.dtype, torch.float32)
    for name, tensor in moments.items():
        if tensor.dtype != state:
            return TypeError(f"{op}: expected {name} of dtype {state}, got {tensor.dtype}")
    for name, tensor in (("weight", weight), *moments.items()):
        if _overlaps(tensor):
            return ValueError(f"{op}: expected {name} of its own memory, got an expanded one")
    return None


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    weight = call.weight
    c = Choosing("galore_adam_", weight, target)
    settled = c.settled("galore_adam_", tuned.factor_sizes(weight.shape, call.exp_avg.shape))
    backend = c.backend(call.backend, *settled)
    if weight.empty:
        c.take("backend", "reference", "rule: nothing to step")
    elif backend == "triton":
        c.take("tiles", c.target, "rule: the target's", c.target.arch)
    return c.done()


plan_galore_adam = Planner("galore_adam_", GaLoreAdam, _decide, check_galore_adam)


def _galore_adam(call: GaLoreAdam, plan: Plan | None) -> None:
    plan = plan or plan_galore_adam.known(call)
    if plan.backend == "reference":
        galore_adam_ref(
            *call[:5],
            step=call.step,
            lr=call.lr,
            betas=(call.beta1, call.beta2),
            eps=call.eps,
            weight_decay=call.weight_decay,
            scale=call.scale,
        )
        return
    numbers: dict[str, Any] = {
        "rate": call.lr * call.scale / (1.0 - call.beta1**call.step),
        "betas": (call.beta1, call.beta2),
        "eps": call.eps,
        "keep": 1.0 - call.lr * call.weight_decay,
        "inverse_root": 1.0 / math.sqrt(1.0 - call.beta2**call.step),
    }
    if plan.backend == "triton":
        from ..kernels.galore import galore_adam_

        galore_adam_(*call[:5], plan.tiles, **numbers)
    else:
        _in_cpp(call, **numbers)


def _in_cpp(
    call: GaLoreAdam, rate: float, betas: tuple[float, float], eps: float, keep: float, inverse_root: float
) -> None:
    """The extension takes W with adjacent columns: a weight whose rows are adjacent is stepped as its transpose."""
    weight, grad, basis, *moments = call[:5]
    tall = weight.stride(1) != 1 and weight.stride(0) == 1
    if tall:
        weight, grad, moments = weight.T, grad.T, [m.T for m in moments]
    written = [weight, *moments]
    adjacent = [unit_columns(t) for t in written]
    operands = adjacent[0], factor(grad), factor(basis), *adjacent[1:]
    cpp.galore_step_(*operands, tall, rate, *betas, eps, keep, inverse_root)
    for t, own in zip(written, adjacent, strict=True):
        if own is not t:
            t.copy_(own)


call_galore_adam_ = define_in_place("galore_adam_", GaLoreAdam, _galore_adam)
