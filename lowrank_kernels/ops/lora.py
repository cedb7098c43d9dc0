"""``lowrank_kernels::lora_linear``: record, check, plan, backends, fakes, autograd, autocast."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import tuned
from ..cpp import cpp
from ..kernels.target import Target
from ..reference.lora import lora_linear_backward_ref, lora_linear_ref
from ..reference.velora import velora_reconstruct_ref
from ..weights import (
    CodedWeight,
    ExpertWeights,
    Weight,
    corrected,
    corrected_backward,
    corrected_grad,
    dense,
    grad_product,
    operand,
    product,
)
from ..weights.dense import library_reads_past_rows
from .library import define_trained, unseen
from .operands import (
    as_rows,
    backend_error,
    device_error,
    factor,
    floats_error,
    frozen_error,
    like_rows_of,
    number_error,
    product_error,
    unit_columns,
    vector,
    vector_error,
)
from .planning import LIBRARY, OWN, REMEMBERED, Choosing, Meta, Plan, Planner
from .velora import dropped, project, reconstruct, velora_error


class LoRALinear(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.lora_linear`. ``save_p``: P is kept for the backward; with a
    ``velora_vector``, z is kept in place of x."""

    x: Tensor
    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    gate: Tensor | None
    scaling: float
    dropout_p: float
    dropout_seed: Tensor | None
    save_p: bool
    backend: str
    velora_vector: Tensor | None = None


class LoRALinearResults(NamedTuple):
    y: Tensor
    p: Tensor | None
    z: Tensor | None


class LoRALinearBackward(NamedTuple):
    """Arguments of the backward. ``needs``: the gradients wanted, of (x, lora_a, lora_b, bias, gate)."""

    grad_y: Tensor
    x: Tensor | None
    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor | None
    p: Tensor | None
    scaling: float
    dropout_p: float
    dropout_seed: Tensor | None
    needs: tuple[bool, ...]
    backend: str
    z: Tensor | None = None
    velora_vector: Tensor | None = None


class LoRALinearGradients(NamedTuple):
    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    gate: Tensor | None


def factors_error(op: str, x: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor) -> Exception | None:
    """The error of x, W, A and B that do not fit together."""
    error = floats_error(op, x=x, weight=weight, lora_a=lora_a, lora_b=lora_b) or product_error(op, x, weight)
    if error is not None:
        return error
    n, k = weight.shape
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        return ValueError(f"{op}: expected lora_a of shape (R, K) = (R, {k}), got {tuple(lora_a.shape)}")
    r = lora_a.shape[0]
    if r == 0:
        return ValueError(f"{op}: expected a rank of at least 1, got lora_a of shape {tuple(lora_a.shape)}")
    if lora_b.shape != (n, r):
        return ValueError(f"{op}: expected lora_b of shape (N, R) = ({n}, {r}), got {tuple(lora_b.shape)}")
    return device_error(op, x, weight=weight, lora_a=lora_a, lora_b=lora_b)


def check_lora_linear(call: LoRALinear) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, x, weight, lora_b = "lora_linear", call.x, call.weight, call.lora_b
    return (
        factors_error(op, x, weight, call.lora_a, lora_b)
        or vector_error(op, "bias", "N", call.bias, weight.shape[0], x.device)
        or vector_error(op, "gate", "R", call.gate, lora_b.shape[1], x.device)
        or velora_error(op, x, call.velora_vector)
        or frozen_error(op, x, weight)
        or number_error(op, "dropout_p", call.dropout_p, 0.0, 1.0)
        or backend_error(op, call.backend)
    )


# --------------------------------------------------------------------------------------------------------------- plan


def forward_products(
    c: Choosing, call: Any, dropout: bool, settled: tuple[tuned.Fields, str], *, scaled: bool = False
) -> None:
    """Who makes the products of x Wᵀ + s drop(x) Aᵀ Bᵀ on a CPU; ``scaled``: its columns are multiplied (DoRA)."""
    x, weight, rank = call.x, call.weight, call.lora_a.shape[0]
    if c.base(x, weight, *settled, coded=True) == OWN:
        c.take("down", OWN, "rule: of the same call")
        c.take("up", OWN, "rule: in the accumulators of x Wᵀ")
    else:
        c.thin("down", x, weight.shape[1], dropout)
        if scaled:
            c.take("up", OWN, "rule: scaled as it is added")
        else:
            c.thin("up", x, rank, False)


def gradient_products(c: Choosing, call: Any, settled: tuple[tuned.Fields, str], *, two_bases: bool = False) -> None:
    """Who makes the products of a backward on a CPU, those that are needed. dB, read across, is the extension's.

    ``two_bases``: dX takes two products with W, which the library makes.
    """
    grad_y, weight, lora_a, dropout = call.grad_y, call.weight, call.lora_a, call.dropout_p > 0.0
    need_x, need_a, need_b = call.needs[:3]
    if need_b:
        c.take("down", OWN, "rule: dY B and dB from one reading of dY")
    else:
        c.thin("down", grad_y, weight.shape[0], False)
    if need_x and two_bases:
        c.take("base", LIBRARY, "rule: dropout of the base product takes two products with W")
        c.thin("up", grad_y, lora_a.shape[0], False)
    elif need_x and c.base(grad_y, weight, *settled, backward=True, coded=True) == OWN:
        c.take("up", OWN, "rule: in the accumulators of dY W")
    elif need_x:
        c.thin("up", grad_y, lora_a.shape[0], dropout)
    if need_a and lora_a.dtype != grad_y.dtype:
        c.take("grad", OWN, "rule: PyTorch gives no gradient of another dtype than its operands'")
    elif need_a:
        c.thin("grad", grad_y, grad_y.rows, dropout)


def forward_tiles(
    c: Choosing, call: Any, dropout: bool, settled: tuple[tuned.Fields, str], *, scaled: bool = False
) -> None:
    """Strategy and tiles of a forward in Triton, from the metas of x, W and A."""
    x, weight, lora_a = call.x.as_operand(), call.weight, call.lora_a.as_operand()
    tiles = c.lora_tiles(x, weight, lora_a.shape[0], dropout, *settled, scaled=scaled)
    y = Meta.contiguous(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    tma = tiles.main.tma and lora_a.describable and y.describable
    c.refine("tiles", replace(tiles, main=replace(tiles.main, tma=tma)))


def gradient_tiles(
    c: Choosing, call: Any, dropout: bool, settled: tuple[tuned.Fields, str], *, scaled: bool = False
) -> None:
    """Strategy and tiles of a backward in Triton, from the metas of dY, W and A."""
    grad_y, weight = call.grad_y.as_operand(), call.weight
    tiles = c.lora_tiles(grad_y, weight, call.lora_a.shape[0], dropout, *settled, scaled=scaled)
    grad_x = Meta.contiguous(grad_y.shape[0], weight.shape[1], dtype=grad_y.dtype, device=grad_y.device)
    tma = tiles.main_dx.tma and grad_x.describable
    c.refine("tiles", replace(tiles, main_dx=replace(tiles.main_dx, tma=tma)))


def directly_readable(x: Meta, *factors: Meta) -> bool:
    """True where the extension's calls for inference take operands as they are."""
    return x.whole and all(t.whole and t.dtype != torch.float64 for t in factors)


def product_sizes(rows: Meta, weight: Meta, lora_a: Meta) -> dict[str, int]:
    """Those that `lrk tune` tells classes of shapes by."""
    return tuned.product_sizes(rows.shape, weight.shape, lora_a.shape[0] if rows.device.type == "cuda" else None)


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    x, weight, a, b = call.x, call.weight, call.lora_a, call.lora_b
    c = Choosing("lora_linear", x, target)
    sizes, dropout = product_sizes(x, weight, a), call.dropout_p > 0.0
    settled = c.settled("lora_linear", sizes)
    backend = c.backend(call.backend, *settled)
    step = c.settled("lora_linear_backward", sizes) if records else settled
    eager = bool(step[0].get("eager")) and call.backend == "auto" and _eager_is_right(call)
    if eager:
        c.take("eager", True, step[1])
    if x.empty or weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    elif backend == "cpu":
        forward_products(c, call, dropout, settled)
        c.ready(x, a, b, call.bias, call.gate, rows=x)
        if c.own and not (dropout or records or eager or weight.coded) and directly_readable(x, a, b):
            c.take("direct", True, "rule: no gradient is recorded, and operands are contiguous")
    elif backend == "triton":
        forward_tiles(c, call, dropout, settled)
    return c.done()


def _eager_is_right(call: Any) -> bool:
    """True where PyTorch's calls give the op's result: no dropout of ours, and no product that reads past rows."""
    x, weight, rank = call.x, call.weight, call.lora_a.shape[0]
    if call.dropout_p > 0.0 or call.velora_vector is not None:
        return False
    if weight.empty or weight.format != "dense" or x.device.type not in ("cpu", "cuda"):
        return False
    return not any(library_reads_past_rows(x.dtype, x.device.type, inner) for inner in (*weight.shape, rank))


def _decide_backward(call: Any, records: bool, target: Target | None) -> Plan:
    grad_y, weight, dropout = call.grad_y, call.weight, call.dropout_p > 0.0
    c = Choosing("lora_linear", grad_y, target)
    backend = c.backend(call.backend, {}, "")
    settled = c.settled("lora_linear_backward", product_sizes(grad_y, weight, call.lora_a))
    if grad_y.empty or weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    elif backend == "cpu":
        gradient_products(c, call, settled)
        c.ready(grad_y, call.lora_a, call.lora_b, call.gate, call.x, rows=grad_y)
    elif backend == "triton":
        gradient_tiles(c, call, dropout, settled)
    return c.done()


plan_lora_linear = Planner("lora_linear", LoRALinear, _decide, check_lora_linear)
_plan_backward = Planner("lora_linear_backward", LoRALinearBackward, _decide_backward)


# ----------------------------------------------------------------------------------------------------------- backends


def _forward(call: LoRALinear, plan: Plan | None) -> LoRALinearResults:
    plan = plan or plan_lora_linear.known(call)
    p: Tensor | None
    if plan.backend == "reference":
        x = as_rows(call.x)
        y, p = lora_linear_ref(
            x,
            dense(call.weight),
            call.lora_a,
            call.lora_b,
            call.bias,
            scaling=call.scaling,
            gate=call.gate,
            dropout_p=call.dropout_p,
            dropout_seed=call.dropout_seed,
        )
    else:
        run = _cpu_forward if plan.backend == "cpu" else _triton_forward
        y, p = run(call if plan.ready else _prepared(call), plan)
    z = None if call.velora_vector is None else _projections(call, plan)
    return LoRALinearResults(like_rows_of(call.x, y), p if call.save_p else None, z)


def _projections(call: LoRALinear, plan: Plan) -> Tensor:
    """z (M, K / d) of drop(x): what dA takes is what A was multiplied with."""
    x, vector = as_rows(call.x), call.velora_vector
    assert vector is not None
    if call.dropout_p > 0.0:
        x = dropped(x, call.dropout_p, call.dropout_seed, plan.backend)
    return project(x, vector)


def _prepared(call: LoRALinear) -> LoRALinear:
    """Operands as kernels read them."""
    return call._replace(
        x=unit_columns(as_rows(call.x)),
        lora_a=factor(call.lora_a),
        lora_b=factor(call.lora_b),
        bias=vector(call.bias),
        gate=vector(call.gate),
    )


def _cpu_forward(call: LoRALinear, plan: Plan) -> tuple[Tensor, Tensor | None]:
    x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p, seed, save_p, *_ = call
    if plan.base == OWN:
        if dropout_p == 0.0 and not save_p and isinstance(weight, Tensor):
            return cpp.lora_linear_inference(x, weight, lora_a, lora_b, bias, gate, scaling, None), None
        y, p, _ = corrected(x, weight, lora_a, lora_b, bias, gate, scaling, seed, dropout_p, None, False)
        return y, p
    p = cpu_down(plan, x, lora_a, False, dropout_p, seed)
    y = product(x, weight, bias)
    cpu_up_(plan, y, p, lora_b, True, scaling, gate=gate)
    return y, p


def _triton_forward(call: LoRALinear, plan: Plan) -> tuple[Tensor, Tensor | None]:
    from ..kernels.lora import lora_linear_fwd

    x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p, seed, save_p, *_ = call
    return lora_linear_fwd(
        x, operand(weight), lora_a, lora_b, plan.tiles, scaling=scaling, store_p=save_p, bias=bias, gate=gate,
        dropout_p=dropout_p, dropout_seed=seed,
    )  # fmt: skip


def lora_linear_directly(call: LoRALinear) -> Tensor:
    """The formula without dropout in one call of the extension, for what is planned so; records no gradient."""
    x, weight, lora_a, lora_b, bias, gate, scaling, *_ = call
    y: Tensor = cpp.lora_linear_inference(x, weight, lora_a, lora_b, bias, gate, scaling, None)
    if len(_DIRECT) >= REMEMBERED:
        _DIRECT.clear()
    _DIRECT.add((x.shape, x.dtype, weight.shape, weight.dtype, lora_a.shape))
    return y


_DIRECT: set[Any] = set()
"""What decides that a call is planned as one call of the extension, of such calls that ran."""
tuned.on_change(lambda anew: _DIRECT.clear())
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def lora_linear_again(
    x: Any, weight: Any, lora_a: Any, lora_b: Any, bias: Any, gate: Any, scaling: float
) -> Tensor | None:
    """y by one call of the extension, where a call of these sizes ran so before; None: to be planned.

    The extension checks what it gets: what it refuses is planned, and checked, like any other call. At one token of a
    small layer this is half of what a call costs beside the product.
    """
    try:
        if torch.is_grad_enabled() and (
            x.requires_grad
            or lora_a.requires_grad
            or lora_b.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (gate is not None and gate.requires_grad)
        ):
            return None
        if (x.shape, x.dtype, weight.shape, weight.dtype, lora_a.shape) not in _DIRECT or not unseen():
            return None
        if not _PLAIN.issuperset((type(x), type(weight), type(lora_a), type(lora_b), type(bias), type(gate))):
            return None
        y: Tensor = cpp.lora_linear_inference(x, weight, lora_a, lora_b, bias, gate, scaling, None)
        return y
    except (AttributeError, TypeError, RuntimeError):
        return None


def lora_linear_eager(call: LoRALinear) -> Tensor:
    """The formula without dropout, as PyTorch's calls, which record their own gradients.

    The weight fills the caches, so that its product comes last: in the forward, or, where gradients are recorded, in
    the backward, whose order is the forward's reversed. At one token that is 4 % of the time.
    """
    x, weight, lora_a, lora_b, bias, gate, scaling, *_ = call
    weight = dense(weight)
    lora_a, lora_b = in_dtype_of(x, lora_a), in_dtype_of(x, lora_b)
    bias = None if bias is None else in_dtype_of(x, bias)
    base = linear(x, weight, bias) if torch.is_grad_enabled() else None
    correction = linear(_gated(linear(x, lora_a), gate), lora_b)
    return torch.add(linear(x, weight, bias) if base is None else base, correction, alpha=scaling)


def _backward(call: LoRALinearBackward, plan: Plan | None) -> LoRALinearGradients:
    plan = plan or _plan_backward.known(call)
    grad_y, _, weight, lora_a, lora_b, gate, p, scaling, dropout_p, seed, needs, *_ = call
    need_x, need_a, need_b, need_bias, need_gate = needs
    by_z = need_a and call.z is not None
    if by_z:  # dA is made of Q, which the others' gradients leave
        needs = need_x, False, need_b, need_bias, need_gate or plan.backend != "reference"
        call = call._replace(needs=needs)
    if plan.backend == "reference":
        grads: tuple[Tensor | None, ...] = lora_linear_backward_ref(
            as_rows(grad_y), call.x, dense(weight), lora_a, lora_b, p,
            scaling=scaling, gate=gate, dropout_p=dropout_p, dropout_seed=seed, needs=needs,
        )  # fmt: skip
        grad_x, grad_a, grad_b, grad_bias, grad_gate = grads
        if by_z:
            grad_a = _grad_a_by_z_ref(call)
    else:
        if not plan.ready:
            call = call._replace(
                grad_y=unit_columns(as_rows(grad_y)),
                x=None if call.x is None else unit_columns(as_rows(call.x)),
                lora_a=factor(lora_a),
                lora_b=factor(lora_b),
                gate=vector(gate),
            )
        run = _cpu_backward if plan.backend == "cpu" else _triton_backward
        grad_x, grad_a, grad_b, q = run(call, plan)
        if by_z:
            grad_a = _grad_a_by_z(call, q, plan)
        grad_a, grad_b = gradient_of(lora_a, grad_a), gradient_of(lora_b, grad_b)
        grad_bias = call.grad_y.sum(0) if need_bias else None
        grad_gate = None
        if need_gate:
            assert q is not None and p is not None and gate is not None
            grad_gate = (scaling * (q.float() * p.float()).sum(0)).to(gate.dtype)
    if grad_x is not None:
        grad_x = like_rows_of(grad_y, grad_x)
    return LoRALinearGradients(grad_x, grad_a, grad_b, grad_bias, grad_gate)


def _grad_a_by_z(call: LoRALinearBackward, q: Tensor | None, plan: Plan) -> Tensor:
    """dA = s (Q ∘ gate)ᵀ x̂ = (s (Q ∘ gate)ᵀ z) ⊗ v, in float32: x̂ is never made."""
    z, vector = call.z, call.velora_vector
    assert q is not None and z is not None and vector is not None
    if plan.backend == "cpu":
        small = cpp.lora_grad(z, q, call.gate, call.scaling, False, None, 0.0, torch.float32)
    else:
        from ..kernels.lora import lora_grad

        small = lora_grad(z, q, False, torch.float32, plan.tiles, scaling=call.scaling, gate=call.gate)
    return reconstruct(small, vector.to(z.dtype))


def _grad_a_by_z_ref(call: LoRALinearBackward) -> Tensor | None:
    grad_y, z, vector = as_rows(call.grad_y), call.z, call.velora_vector
    assert z is not None and vector is not None
    wide = torch.promote_types(z.dtype, torch.float32)
    estimate = velora_reconstruct_ref(z.to(wide), vector.to(z.dtype))
    operands = grad_y, estimate, dense(call.weight), call.lora_a, call.lora_b, None
    needs = False, True, False, False, False
    return lora_linear_backward_ref(*operands, scaling=call.scaling, gate=call.gate, needs=needs).lora_a


def gradient_of(operand: Tensor, gradient: Tensor | None) -> Tensor | None:
    """A gradient in its operand's dtype: kernels give float32 for float64."""
    return gradient if gradient is None or gradient.dtype is operand.dtype else gradient.to(operand.dtype)


def _cpu_backward(call: LoRALinearBackward, plan: Plan) -> tuple[Tensor | None, ...]:
    grad_y, x, weight, lora_a, lora_b, gate, p, scaling, dropout_p, seed, needs, *_ = call
    need_x, need_a, need_b, _, need_gate = needs
    q = grad_x = grad_a = grad_b = None
    if need_x and need_a and need_b and plan.base == OWN and plan.grad == OWN:
        assert x is not None
        return corrected_backward(grad_y, x, weight, lora_a, lora_b, p, gate, scaling, seed, dropout_p)
    if need_x or need_a or need_gate:
        if need_b:
            q, grad_b = cpp.lora_down_grad(grad_y, lora_b, p, gate, scaling, lora_b.dtype)
        else:
            q = cpu_down(plan, grad_y, lora_b, True)
    elif need_b:
        assert p is not None
        grad_b = cpp.lora_grad(grad_y, p, gate, scaling, True, None, 0.0, lora_b.dtype)
    if need_x:
        assert q is not None
        if plan.base == OWN:
            grad_x = corrected_grad(grad_y, q, weight, lora_a, gate, scaling, seed, dropout_p, None)
        else:
            grad_x = grad_product(grad_y, weight)
            cpu_up_(plan, grad_x, q, lora_a, False, scaling, gate=gate, dropout_p=dropout_p, seed=seed)
    if need_a:
        assert q is not None and x is not None
        grad_a = cpu_grad_a(plan, x, q, scaling, lora_a.dtype, gate=gate, dropout_p=dropout_p, seed=seed)
    return grad_x, grad_a, grad_b, q


def _triton_backward(call: LoRALinearBackward, plan: Plan) -> tuple[Tensor | None, ...]:
    from ..kernels.lora import lora_linear_bwd

    grad_y, x, weight, lora_a, lora_b, gate, p, scaling, dropout_p, seed, needs, *_ = call
    return lora_linear_bwd(
        grad_y, x, operand(weight), lora_a, lora_b, p, plan.tiles, scaling=scaling, needs=needs[:3], gate=gate,
        dropout_p=dropout_p, dropout_seed=seed, need_q=needs[4],
    )  # fmt: skip


def _gated(p: Tensor, gate: Tensor | None) -> Tensor:
    return p if gate is None else (p * gate).to(p.dtype)


def cpu_down(
    plan: Plan, x: Tensor, factor: Tensor, rank_last: bool, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """drop(x) Aᵀ, or with ``rank_last`` x B: (M, R) in x's dtype."""
    if plan.down == LIBRARY:
        return x @ in_dtype_of(x, factor if rank_last else factor.T)
    p: Tensor = cpp.lora_down(x, factor, rank_last, seed, dropout_p)
    return p


def cpu_up_(
    plan: Plan, y: Tensor, p: Tensor, factor: Tensor, rank_last: bool, scaling: float, *, gate: Tensor | None = None,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """y += drop'(s (p ∘ gate) factor), in place."""
    if plan.up == LIBRARY:
        y.addmm_(_gated(p, gate), in_dtype_of(y, factor.T if rank_last else factor), alpha=scaling)
    else:
        cpp.lora_up_(y, p, factor, rank_last, gate, scaling, seed, dropout_p)


def cpu_grad_a(
    plan: Plan,
    x: Tensor,
    q: Tensor,
    scaling: float,
    dtype: torch.dtype,
    *,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """s (q ∘ gate)ᵀ drop(x): (R, K)."""
    if plan.grad == LIBRARY:
        return torch.mm(_gated(q, gate).T, x).mul_(scaling)
    grad_a: Tensor = cpp.lora_grad(x, q, gate, scaling, False, seed, dropout_p, dtype)
    return grad_a


def in_dtype_of(x: Tensor, other: Tensor) -> Tensor:
    return other if other.dtype is x.dtype else other.to(x.dtype)  # Tensor.to costs microseconds to do nothing


# ------------------------------------------------------------------------------------------- registration with torch


def rows_in(x: Tensor) -> int:
    """M of x (..., K), from sizes that may be symbolic."""
    return math.prod(x.shape[:-1])


def empty_factor(factor: Tensor) -> Tensor:
    """A fake gradient of a factor."""
    return torch.empty_like(factor, memory_format=torch.contiguous_format)


def _forward_fake(call: LoRALinear) -> LoRALinearResults:
    x = call.x
    y = x.new_empty(*x.shape[:-1], call.weight.shape[0])
    rows, vector = rows_in(x), call.velora_vector
    p = x.new_empty(rows, call.lora_a.shape[0]) if call.save_p else x.new_empty(0)
    z = x.new_empty(0) if vector is None else x.new_empty(rows, x.shape[-1] // vector.shape[0])
    return LoRALinearResults(y, p, z)


def _backward_fake(call: LoRALinearBackward) -> LoRALinearGradients:
    grad_y, gate = call.grad_y, call.gate
    n, k = call.weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k),
        empty_factor(call.lora_a),
        empty_factor(call.lora_b),
        grad_y.new_empty(n),
        grad_y.new_empty(0) if gate is None else torch.empty_like(gate),
    )
    return LoRALinearGradients(*wanted(shapes, call.needs, grad_y))


def wanted(shapes: tuple[Tensor, ...], needs: tuple[bool, ...], like: Tensor) -> list[Tensor]:
    """Fake gradients: empty ones where none is wanted."""
    return [shape if need else like.new_empty(0) for shape, need in zip(shapes, needs, strict=True)]


def _keep(call: LoRALinear, results: LoRALinearResults) -> dict[str, Any]:
    by_z = call.velora_vector is not None
    return {
        "x": call.x if call.lora_a.requires_grad and not by_z else None,
        "p": results.p if call.save_p else None,
        "z": results.z if by_z else None,
    }


def cast_products(dtype: torch.dtype, call: Any) -> Any:
    """Autocast of x, W and the bias. Factors keep their dtype: the kernels round them, without a copy in memory."""
    return call._replace(**{name: _cast(dtype, getattr(call, name)) for name in ("x", "weight", "bias")})


def _cast(dtype: torch.dtype, t: Any) -> Any:
    return t.to(dtype) if isinstance(t, (Tensor, CodedWeight, ExpertWeights)) and t.dtype != torch.float64 else t


call_lora_linear = define_trained(
    "lora_linear",
    LoRALinear,
    LoRALinearResults,
    LoRALinearBackward,
    LoRALinearGradients,
    forward=(_forward, _forward_fake),
    backwards=(_backward, _backward_fake),
    keep=_keep,
    autocast=cast_products,
)
