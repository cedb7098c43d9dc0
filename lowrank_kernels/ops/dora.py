"""``lowrank_kernels::dora_weight_norm`` and ``dora_linear``: records, checks, plans, backends, fakes, autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..cpp import cpp
from ..kernels.target import Target
from ..reference.dora import (
    dora_column_scale_ref,
    dora_linear_backward_ref,
    dora_linear_ref,
    dora_weight_norm_ref,
)
from ..weights import Weight, corrected, corrected_grad, dense, grad_product, operand, product
from ..weights import rows as weight_rows
from .backend import KERNEL_DTYPES, why_not
from .library import define, define_trained
from .lora import (
    cast_products,
    cpu_down,
    cpu_grad_a,
    cpu_up_,
    directly_readable,
    empty_factor,
    factors_error,
    forward_products,
    forward_tiles,
    gradient_of,
    gradient_products,
    gradient_tiles,
    product_sizes,
    rows_in,
    wanted,
)
from .operands import (
    as_rows,
    backend_error,
    factor,
    flag_error,
    float32_vector,
    frozen_error,
    like_rows_of,
    number_error,
    raise_error,
    scaling_error,
    unit_columns,
    vector,
    vector_error,
)
from .planning import OWN, Choosing, Meta, Plan, Planner


class DoRAWeightNorm(NamedTuple):
    """Arguments of the norm's op; with a ``magnitude`` it gives the column scale too."""

    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    weight_sq_norm: Tensor | None
    magnitude: Tensor | None
    backend: str


class DoRAWeightNormResults(NamedTuple):
    norm: Tensor
    sq_norm: Tensor
    column_scale: Tensor | None


class DoRALinear(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.dora_linear`. ``save``: P and u are kept for the backward."""

    x: Tensor
    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    weight_sq_norm: Tensor | None
    norm: Tensor | None
    column_scale: Tensor | None
    bias: Tensor | None
    scaling: float
    dropout_p: float
    dropout_seed: Tensor | None
    dropout_base: bool
    detach_norm: bool
    save: bool
    backend: str


class DoRALinearResults(NamedTuple):
    """``norm`` and ``column_scale`` are None where they were given, P and u unless ``save``."""

    y: Tensor
    p: Tensor | None
    u: Tensor | None
    norm: Tensor | None
    column_scale: Tensor | None


class DoRALinearBackward(NamedTuple):
    """Arguments of the backward. ``needs``: the gradients wanted, of (x, lora_a, lora_b, magnitude, bias)."""

    grad_y: Tensor
    x: Tensor | None
    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    norm: Tensor
    column_scale: Tensor
    p: Tensor | None
    u: Tensor | None
    scaling: float
    dropout_p: float
    dropout_seed: Tensor | None
    dropout_base: bool
    detach_norm: bool
    needs: tuple[bool, ...]
    magnitude_dtype: torch.dtype
    backend: str


class DoRALinearGradients(NamedTuple):
    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    magnitude: Tensor | None
    bias: Tensor | None


def check_dora_weight_norm(call: DoRAWeightNorm, op: str = "dora_weight_norm") -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    weight, lora_a, lora_b, scaling, weight_sq_norm, _, backend = call
    error = backend_error(op, backend) or scaling_error(op, scaling, getattr(weight, "dtype", torch.float32))
    if error is not None:
        return error
    if not hasattr(weight, "is_floating_point") or weight.dim() != 2 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        return TypeError(f"{op}: expected weight to be a tensor of shape (N, K) and a floating dtype, got {got}")
    if isinstance(lora_a, Tensor) and lora_a.device != weight.device:
        return ValueError(f"{op}: expected weight and lora_a on one device, got {weight.device} and {lora_a.device}")
    no_rows = torch.empty(0, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return factors_error(op, no_rows, weight, lora_a, lora_b) or vector_error(
        op, "weight_sq_norm", "N", weight_sq_norm, weight.shape[0], weight.device, like="weight"
    )


def magnitude_error(op: str, magnitude: Any, weight: Weight) -> Exception | None:
    if not isinstance(magnitude, Tensor):
        return TypeError(f"{op}: expected magnitude to be a tensor, got {type(magnitude).__name__}")
    return vector_error(op, "magnitude", "N", magnitude, weight.shape[0], weight.device, like="weight")


def check_dora_linear(call: DoRALinear) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, x, weight = "dora_linear", call.x, call.weight
    error = factors_error(op, x, weight, call.lora_a, call.lora_b)
    if error is not None:
        return error
    n, device = weight.shape[0], x.device
    of_weight = {
        "weight_sq_norm": call.weight_sq_norm,
        "n of norm_and_scale": call.norm,
        "g of norm_and_scale": call.column_scale,
    }
    errors = (vector_error(op, name, "N", t, n, device, like="weight") for name, t in of_weight.items())
    return (
        vector_error(op, "bias", "N", call.bias, n, device)
        or frozen_error(op, x, weight)
        or number_error(op, "dropout_p", call.dropout_p, 0.0, 1.0)
        or magnitude_error(op, call.magnitude, weight)
        or backend_error(op, call.backend)
        or next((e for e in errors if e is not None), None)
        or flag_error(op, "dropout_base", call.dropout_base)
        or flag_error(op, "detach_norm", call.detach_norm)
    )


def pair_of(norm_and_scale: Any) -> tuple[Any, Any]:
    """(n, g) as a caller gave them, or two None.

    Raises:
        TypeError: something else.
    """
    if norm_and_scale is None:
        return None, None
    if not isinstance(norm_and_scale, tuple) or len(norm_and_scale) != 2 or any(t is None for t in norm_and_scale):
        raise TypeError(f"dora_linear: expected norm_and_scale to be a pair (n, g) or None, got {norm_and_scale!r:.60}")
    return norm_and_scale


# --------------------------------------------------------------------------------------------------------------- norm

_LARGEST_CUDA_RANK = 512  # of the CUDA C++ kernel, which keeps A Aᵀ's rows in shared memory


def _decide_norm(call: Any, records: bool, target: Target | None) -> Plan:
    weight, rank = call.weight, call.lora_a.shape[0]
    c = Choosing("dora_weight_norm", weight, target)
    fields, source = c.settled("dora_weight_norm", tuned.factor_sizes(weight.shape, call.lora_a.shape))
    backend = c.backend(call.backend, fields, source)
    if backend == "cuda" and rank > _LARGEST_CUDA_RANK:
        if call.backend != "auto":
            raise ValueError(
                f"dora_weight_norm: expected a rank of at most {_LARGEST_CUDA_RANK} for backend 'cuda', "
                f"got {rank}; use backend='triton'"
            )
        other = why_not("dora_weight_norm", "triton", "cuda", weight.dtype)
        name = "reference" if other else "triton"
        backend = c.take("backend", name, f"rule: rank {rank}, of at most {_LARGEST_CUDA_RANK} in CUDA C++")
    if weight.empty:
        c.take("backend", "reference", "rule: nothing to read")
    elif weight.format != "dense":
        c.take("by_rows", True, f"rule: {weight.format} weights are read in blocks of dense rows")
    if backend == "cuda" and fields.get("clusters") is False:
        c.take("clusters", False, source)
    if backend == "triton":
        c.take("tiles", c.target, "rule: the target's", c.target.arch)
    return c.done()


_plan_norm = Planner("dora_weight_norm", DoRAWeightNorm, _decide_norm)


def _norm(call: DoRAWeightNorm, plan: Plan | None) -> DoRAWeightNormResults:
    plan = plan or _plan_norm.known(call)
    weight, lora_a, lora_b, scaling, weight_sq_norm, magnitude, _ = call
    if plan.by_rows:
        return _norm_by_rows(call, plan)
    if plan.backend == "reference":
        weight = dense(weight)
        wide = dora_weight_norm_ref(weight, lora_a, lora_b, scaling=scaling)
        norm = wide.to(torch.promote_types(weight.dtype, torch.float32))
        if weight_sq_norm is None:
            weight_sq_norm = weight.to(norm.dtype).square().sum(1)
        scale = None if magnitude is None else dora_column_scale_ref(magnitude, norm)
        return DoRAWeightNormResults(norm, weight_sq_norm.to(norm.dtype, copy=True), scale)
    assert isinstance(weight, Tensor)
    weight, lora_a, lora_b = unit_columns(weight), factor(lora_a), factor(lora_b)
    sq_norm, magnitude = float32_vector(weight_sq_norm), vector(magnitude)
    if plan.backend == "triton":
        from ..kernels.dora import dora_norm

        found = dora_norm(weight, lora_a, lora_b, scaling, plan.tiles, weight_sq_norm=sq_norm, magnitude=magnitude)
    else:
        found = cpp.dora_norm(weight, lora_a, lora_b, scaling, sq_norm, magnitude, plan.clusters)
    norm, sq_norm, scale = found
    return DoRAWeightNormResults(norm, sq_norm, None if magnitude is None else scale)


_ROWS_AT_ONCE = 1 << 22  # elements of W that are widened at a time
_UNPACKED_AT_ONCE = 1 << 19  # ... or made dense


def _norm_by_rows(call: DoRAWeightNorm, plan: Plan) -> DoRAWeightNormResults:
    """The norms of a W that is not dense, some rows at a time."""
    n, k = call.weight.shape
    step = max(1, _UNPACKED_AT_ONCE // max(1, k))
    parts = []
    for start in range(0, n, step):
        own = slice(start, min(n, start + step))
        sq_norm, magnitude = (None if t is None else t[own] for t in (call.weight_sq_norm, call.magnitude))
        dense_rows = weight_rows(call.weight, own.start, own.stop)
        part = call._replace(weight=dense_rows, lora_b=call.lora_b[own], weight_sq_norm=sq_norm, magnitude=magnitude)
        parts.append(_norm(part, None))
    joined: Any = [None if t[0] is None else torch.cat(t) for t in zip(*parts, strict=True)]
    return DoRAWeightNormResults(*joined)


def _norm_fake(call: DoRAWeightNorm) -> DoRAWeightNormResults:
    weight = call.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = call.lora_a.new_empty(weight.shape[0], dtype=dtype)
    scale = norm.new_empty(0) if call.magnitude is None else torch.empty_like(norm)
    return DoRAWeightNormResults(norm, torch.empty_like(norm), scale)


def _save_norm(ctx: Any, call: DoRAWeightNorm, results: DoRAWeightNormResults) -> None:
    norm, sq_norm, scale = results
    ctx.mark_non_differentiable(*(t for t in (sq_norm, scale) if t is not None))
    ctx.set_materialize_grads(False)
    weight, dense_weight = call.weight, isinstance(call.weight, Tensor)
    ctx.save_for_backward(weight if dense_weight else None, call.lora_a, call.lora_b, norm)
    ctx.others = None if dense_weight else weight, call.scaling


def _backward_of_norm(ctx: Any, grad_norm: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_norm is None:
        return (None,) * 8
    (weight, lora_a, lora_b, norm), (packed, scaling) = ctx.saved_tensors, ctx.others
    row_factor = torch.where(norm == 0, 0.0, grad_norm / norm)
    grads = _norm_gradients(weight if packed is None else packed, lora_a, lora_b, scaling, row_factor)
    return None, None, *(grad.to(f.dtype) for grad, f in zip(grads, (lora_a, lora_b), strict=True)), *(None,) * 4


def _norm_gradients(
    weight: Weight, lora_a: Tensor, lora_b: Tensor, scaling: float, row_factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i c_i ‖V_i‖² / 2, V = W + s B A, with c the row factor: s Bᵀ (c ∘ V) and s (c ∘ V) Aᵀ.

    Only (N, R), (R, K) and (R, R) products: V is never formed. Widened to the row factor's dtype by blocks of rows.
    """
    wide = row_factor.dtype
    a, b = lora_a.to(wide), lora_b.to(wide)
    weighted_b = row_factor[:, None] * b
    grad_a = scaling * scaling * (b.T @ weighted_b) @ a
    grad_b = scaling * scaling * weighted_b @ (a @ a.T)
    rows_at_once = max(1, _ROWS_AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows_at_once):
        rows = slice(start, min(weight.shape[0], start + rows_at_once))
        w = weight_rows(weight, rows.start, rows.stop).to(wide)
        grad_a = grad_a.addmm_(weighted_b[rows].T, w, alpha=scaling)
        grad_b[rows] += scaling * row_factor[rows, None] * (w @ a.T)
    return grad_a, grad_b


# --------------------------------------------------------------------------------------------------------------- plan


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    x, weight, a, b = call.x, call.weight, call.lora_a, call.lora_b
    c = Choosing("dora_linear", x, target)
    dropout = call.dropout_p > 0.0
    thinned = dropout and not call.dropout_base  # dropout of both products is drawn before them
    settled = c.settled("dora_linear", product_sizes(x, weight, a))
    backend = c.backend(call.backend, *settled)
    if x.empty or weight.empty:
        backend = c.take("backend", "reference", "rule: nothing to multiply")
    elif backend == "cpu":
        forward_products(c, call, thinned, settled, scaled=True)
        c.ready(x, a, b, call.bias, rows=x)
        if not dropout and not records and directly_readable(x, a, b) and weight.stride[1] == 1:
            if call.norm is not None and c.own and not weight.coded:
                c.take("direct", True, "rule: no gradient is recorded, and operands are contiguous")
            if call.norm is None and weight.format == "dense":
                c.take("remembers", True, "rule: no gradient is recorded, and operands are contiguous")
    elif backend == "triton":
        rows = call
        if dropout and call.dropout_base:  # kernels get drop(x), a matrix of its own
            rows = call._replace(x=Meta.contiguous(*x.as_operand().shape, dtype=x.dtype, device=x.device))
        forward_tiles(c, rows, thinned, settled, scaled=True)
    if call.norm is None:
        if backend == "cpu" and c.own and not weight.coded:  # W is read once for the product and the norms
            c.take("norm", "inside", "rule: the extension's own product makes the norms too")
        else:
            made = _decide_norm(_norm_call(call), False, target)
            c.take("norm", made, "rule: a pass of its own", made.backend)
    return c.done()


def _decide_backward(call: Any, records: bool, target: Target | None) -> Plan:
    grad_y, weight = call.grad_y, call.weight
    dropout = call.dropout_p > 0.0
    c = Choosing("dora_linear", grad_y, target)
    backend = c.backend(call.backend, {}, "")
    settled = c.settled("dora_linear_backward", product_sizes(grad_y, weight, call.lora_a))
    if grad_y.empty or weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    elif backend == "cpu":
        gradient_products(c, call, settled, two_bases=dropout and call.dropout_base)
        c.ready(grad_y, call.lora_a, call.lora_b, call.x, rows=grad_y)
    elif backend == "triton":
        gradient_tiles(c, call, dropout, settled, scaled=True)
    return c.done()


plan_dora_linear = Planner("dora_linear", DoRALinear, _decide, check_dora_linear)
_plan_backward = Planner("dora_linear_backward", DoRALinearBackward, _decide_backward)


def _norm_call(call: Any) -> DoRAWeightNorm:
    """The norm's call inside."""
    factors = call.weight, call.lora_a, call.lora_b
    return DoRAWeightNorm(*factors, call.scaling, call.weight_sq_norm, call.magnitude, call.backend)


# ----------------------------------------------------------------------------------------------------------- backends


def _forward(call: DoRALinear, plan: Plan | None) -> DoRALinearResults:
    plan = plan or plan_dora_linear.known(call)
    p: Tensor | None
    u: Tensor | None
    norm, scale = call.norm, call.column_scale
    inside = plan.norm == "inside"
    if norm is None and not inside:
        norm, _, scale = _norm(_norm_call(call), None if isinstance(plan.norm, str) else plan.norm)
    if plan.backend == "reference":
        assert scale is not None
        y, p, u = dora_linear_ref(
            as_rows(call.x),
            dense(call.weight),
            call.lora_a,
            call.lora_b,
            scale,
            call.bias,
            scaling=call.scaling,
            dropout_p=call.dropout_p,
            dropout_seed=call.dropout_seed,
            dropout_base=call.dropout_base,
        )
    else:
        given = call if plan.ready else _prepared(call)
        rest = None
        if call.dropout_base and call.dropout_p > 0.0:
            # y = g ∘ (d Wᵀ + s d Aᵀ Bᵀ) + (x - d) Wᵀ + bias with d = drop(x): plain DoRA on d, and what d lost.
            dropped = _drop(given.x, call.dropout_p, call.dropout_seed, plan.backend)
            rest = product(given.x - dropped, call.weight, given.bias)
            given = given._replace(x=dropped, bias=None, dropout_p=0.0, dropout_seed=None)
        if inside:
            y, p, u, norm, scale = cpp.dora_linear_fused(
                given.x,
                given.weight,
                given.lora_a,
                given.lora_b,
                vector(call.magnitude),
                float32_vector(call.weight_sq_norm),
                given.bias,
                given.scaling,
                given.dropout_seed,
                given.dropout_p,
                given.save,
            )
        else:
            scale32 = float32_vector(scale)
            assert scale32 is not None
            y, p, u = _scaled_product(given, scale32, plan)
        if rest is not None:
            y = y.add_(rest)
    y = like_rows_of(call.x, y)
    if call.norm is not None:
        norm = scale = None
    return DoRALinearResults(y, p, u, norm, scale) if call.save else DoRALinearResults(y, None, None, norm, scale)


def _prepared(call: DoRALinear) -> DoRALinear:
    """Operands as kernels read them."""
    return call._replace(
        x=unit_columns(as_rows(call.x)), lora_a=factor(call.lora_a), lora_b=factor(call.lora_b), bias=vector(call.bias)
    )


class ScaleCache:
    """The column scale g of a layer, kept between calls with hashes of all that it was computed from.

    ``dora_linear(..., scale_cache=...)`` uses it where W, A, B, m and s are what they were, told by their values (64
    bits a row), and makes it anew where not: never by version counters or addresses, which fused optimizer steps, FSDP2
    and writes through ``.data`` leave as they are. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget g. Never needed for a right result."""
        self.kept: tuple[Tensor | None, Tensor | None] = (None, None)  # (g, hashes), replaced together

    def __deepcopy__(self, memo: Any) -> ScaleCache:
        return ScaleCache()

    def __reduce__(self) -> Any:
        return ScaleCache, ()


def norm_of_shards(call: DoRALinear) -> DoRALinear:
    """The call with n and g where W is a DTensor that is cut along K."""
    raise_error(check_dora_linear(call))
    from .sharding import with_norm

    return with_norm(call)


def dora_linear_directly(call: DoRALinear) -> Tensor:
    """y with a column scale that is given, in one call of the extension, for what is planned so."""
    scale = float32_vector(call.column_scale)
    y: Tensor = cpp.lora_linear_inference(
        call.x, call.weight, call.lora_a, call.lora_b, call.bias, None, call.scaling, scale
    )
    return y


def dora_linear_remembering(call: DoRALinear, plan: Plan, cache: ScaleCache) -> Tensor:
    """y without dropout, with g from the cache or into it, for what is planned so.

    On a CPU alone, where the hash of a row of W is taken as the row is multiplied: on a GPU, whether it is the same
    would have to be waited for, and n costs the same read of W.
    """
    x, weight, lora_a, lora_b, magnitude, *_ = call
    g, hashes = cache.kept
    if plan.base == OWN:
        y, new_g, new_hashes = cpp.dora_linear_remembering(
            x, weight, lora_a, lora_b, magnitude, call.bias, call.scaling, g, hashes
        )
        if new_hashes.numel():
            cache.kept = (new_g, new_hashes)
        return y
    new_g, new_hashes = cpp.dora_column_scale_remembering(weight, lora_a, lora_b, magnitude, call.scaling, g, hashes)
    if new_hashes.numel():
        cache.kept = (g, _) = (new_g, new_hashes)
    assert g is not None
    y, _, _ = _scaled_product(_prepared(call), g, plan)
    return like_rows_of(x, y)


def _drop(x: Tensor, dropout_p: float, dropout_seed: Tensor | None, backend: str) -> Tensor:
    assert dropout_seed is not None
    if backend == "triton":
        from ..kernels.dora import dropout

        return dropout(x, dropout_p, dropout_seed)
    keep = cpp.dropout_keep_mask(dropout_seed, x.shape[0], x.shape[1], dropout_p)
    return torch.where(keep, x / (1.0 - dropout_p), 0.0)


def _scaled_product(call: DoRALinear, column_scale: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = g ∘ u + bias, P and u = x Wᵀ + s drop(x) Aᵀ Bᵀ; P and u are only right when ``save``."""
    x, weight, lora_a, lora_b = call[:4]
    bias, scaling, dropout_p, seed, save = call.bias, call.scaling, call.dropout_p, call.dropout_seed, call.save
    if plan.backend == "triton":
        from ..kernels.dora import dora_linear_fwd

        return dora_linear_fwd(
            x, operand(weight), lora_a, lora_b, column_scale, plan.tiles, scaling=scaling, save=save, bias=bias,
            dropout_p=dropout_p, dropout_seed=seed,
        )  # fmt: skip
    if plan.base == OWN:
        if dropout_p == 0.0 and not save and isinstance(weight, Tensor):
            y = cpp.lora_linear_inference(x, weight, lora_a, lora_b, bias, None, scaling, column_scale)
            return y, None, None
        return corrected(x, weight, lora_a, lora_b, bias, None, scaling, seed, dropout_p, column_scale, save)
    p = cpu_down(plan, x, lora_a, False, dropout_p, seed)
    u = product(x, weight, None)
    y = torch.empty_like(u) if save else u
    cpp.dora_up_(u, p, lora_b, scaling, column_scale, bias, y if save else None)
    return y, p, u


def _backward(call: DoRALinearBackward, plan: Plan | None) -> DoRALinearGradients:
    plan = plan or _plan_backward.known(call)
    grad_y, lora_a, lora_b = call.grad_y, call.lora_a, call.lora_b
    need_x, need_a, need_b, need_m, need_bias = call.needs
    if plan.backend == "reference":
        grads = dora_linear_backward_ref(
            as_rows(grad_y), call.x, dense(call.weight), lora_a, lora_b, call.column_scale, call.norm, call.p,
            u=call.u, scaling=call.scaling, dropout_p=call.dropout_p, dropout_seed=call.dropout_seed,
            dropout_base=call.dropout_base, detach_norm=call.detach_norm, needs=call.needs,
        )  # fmt: skip
        grad_x, grad_a, grad_b, grad_m, grad_bias = grads
    else:
        through_norm = not call.detach_norm and (need_a or need_b)
        norm, column_scale = float32_vector(call.norm), float32_vector(call.column_scale)
        assert norm is not None and column_scale is not None
        given = call._replace(
            norm=norm,
            column_scale=column_scale,
            dropout_base=call.dropout_base and call.dropout_p > 0.0,
            needs=(need_x, need_a, need_b, need_m or through_norm),
            magnitude_dtype=call.magnitude_dtype
            if call.magnitude_dtype in KERNEL_DTYPES and not through_norm
            else torch.float32,
        )
        if not plan.ready:
            given = given._replace(
                grad_y=unit_columns(as_rows(grad_y)),
                x=None if call.x is None else unit_columns(as_rows(call.x)),
                lora_a=factor(lora_a),
                lora_b=factor(lora_b),
            )
        run = _triton_backward if plan.backend == "triton" else _cpu_backward
        grad_x, grad_a, grad_b, grad_m = run(given, plan)
        if through_norm:
            assert grad_m is not None
            row_factor = torch.where(given.norm == 0, 0.0, -given.column_scale * grad_m / given.norm)
            more_a, more_b = _norm_gradients(call.weight, lora_a, lora_b, call.scaling, row_factor)
            grad_a = None if grad_a is None else grad_a + more_a
            grad_b = None if grad_b is None else grad_b + more_b
        grad_a, grad_b = gradient_of(lora_a, grad_a), gradient_of(lora_b, grad_b)
        grad_bias = given.grad_y.sum(0) if need_bias else None
    if grad_x is not None:
        grad_x = like_rows_of(grad_y, grad_x)
    grad_m = grad_m.to(call.magnitude_dtype) if need_m and grad_m is not None else None
    return DoRALinearGradients(grad_x, grad_a, grad_b, grad_m, grad_bias)


def _cpu_backward(call: DoRALinearBackward, plan: Plan) -> tuple[Tensor | None, ...]:
    """(dX, dA, dB, dm = Σ_m dY ∘ u / n): Q, dB and dm from one pass over dY and u, and dU = g ∘ dY where it is read."""
    grad_y, x, weight, lora_a, lora_b, norm, column_scale, p, u, scaling, dropout_p, seed, dropout_base = call[:13]
    need_x, need_a, need_b, need_m = call.needs
    own = need_x and plan.base == OWN
    if own and need_a and need_b and plan.grad == OWN and isinstance(weight, Tensor):
        grads = cpp.dora_backward(
            grad_y, x, weight, lora_a, lora_b, norm, column_scale, p, u if need_m else None, scaling, seed, dropout_p
        )
        return *grads[:3], grads[3] if need_m else None
    scale_operands = grad_y, u if need_m else None, column_scale, norm
    q: Any = None
    grad_b = grad_x = grad_a = None
    if need_b and (need_x or need_a):
        grad_u, grad_m, q, grad_b = cpp.dora_down_grad(
            *scale_operands, lora_b, p, scaling, lora_b.dtype, need_x and not own
        )
    else:
        grad_u, grad_m = cpp.dora_scale_grad(*scale_operands)
        if need_b:
            assert p is not None
            grad_b = cpp.lora_grad(grad_u, p, None, scaling, True, None, 0.0, lora_b.dtype)
        elif need_x or need_a:
            q = cpu_down(plan, grad_u, lora_b, True)
    if own:  # g goes into the rows of W as they are packed
        grad_x = corrected_grad(grad_y, q, weight, lora_a, None, scaling, seed, dropout_p, column_scale)
    elif need_x and dropout_base:
        through_mask = grad_product(grad_u - grad_y, weight)
        cpu_up_(plan, through_mask, q, lora_a, False, scaling)
        grad_x = grad_product(grad_y, weight).add_(_drop(through_mask, dropout_p, seed, "cpu"))
    elif need_x:
        grad_x = grad_product(grad_u, weight)
        cpu_up_(plan, grad_x, q, lora_a, False, scaling, dropout_p=dropout_p, seed=seed)
    if need_a:
        assert x is not None
        grad_a = cpu_grad_a(plan, x, q, scaling, lora_a.dtype, dropout_p=dropout_p, seed=seed)
    return grad_x, grad_a, grad_b, grad_m if need_m else None


def _triton_backward(call: DoRALinearBackward, plan: Plan) -> tuple[Tensor | None, ...]:
    from ..kernels.dora import dora_linear_bwd

    return dora_linear_bwd(
        call.grad_y, call.x, operand(call.weight), call.lora_a, call.lora_b, plan.tiles, norm=call.norm,
        column_scale=call.column_scale, p=call.p, u=call.u, scaling=call.scaling, needs=call.needs,
        magnitude_dtype=call.magnitude_dtype, dropout_p=call.dropout_p, dropout_seed=call.dropout_seed,
        dropout_base=call.dropout_base,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- registration with torch


def _forward_fake(call: DoRALinear) -> DoRALinearResults:
    x, n = call.x, call.weight.shape[0]
    y, nothing = x.new_empty(*x.shape[:-1], n), x.new_empty(0)
    norms = nothing, nothing.clone()
    if call.norm is None:
        norm = x.new_empty(n, dtype=torch.promote_types(call.weight.dtype, torch.float32))
        norms = norm, torch.empty_like(norm)
    if not call.save:
        return DoRALinearResults(y, nothing.clone(), nothing.clone(), *norms)
    return DoRALinearResults(y, x.new_empty(rows_in(x), call.lora_a.shape[0]), x.new_empty(rows_in(x), n), *norms)


def _backward_fake(call: DoRALinearBackward) -> DoRALinearGradients:
    grad_y = call.grad_y
    n, k = call.weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k),
        empty_factor(call.lora_a),
        empty_factor(call.lora_b),
        torch.empty_like(call.norm, dtype=call.magnitude_dtype),
        grad_y.new_empty(n),
    )
    return DoRALinearGradients(*wanted(shapes, call.needs, grad_y))


def _keep(call: DoRALinear, results: DoRALinearResults) -> dict[str, Any]:
    needs_norm = not call.detach_norm and (call.lora_a.requires_grad or call.lora_b.requires_grad)
    given = call if call.norm is not None else results
    return {
        "x": call.x if call.lora_a.requires_grad else None,
        "p": results.p if call.save and call.lora_b.requires_grad else None,
        "u": results.u if call.save and (call.magnitude.requires_grad or needs_norm) else None,
        "norm": given.norm,
        "column_scale": given.column_scale,
    }


def _autocast(dtype: torch.dtype, call: DoRALinear) -> DoRALinear:
    if call.norm is None:  # of W as it is, not as it is multiplied
        with torch.no_grad():
            norm, _, column_scale = call_dora_weight_norm(_norm_call(call))
        call = call._replace(norm=norm, column_scale=column_scale)
    cast: DoRALinear = cast_products(dtype, call)
    return cast


call_dora_weight_norm = define(
    "dora_weight_norm",
    DoRAWeightNorm,
    DoRAWeightNormResults,
    _norm,
    _norm_fake,
    save=_save_norm,
    backward=_backward_of_norm,
)
call_dora_linear = define_trained(
    "dora_linear",
    DoRALinear,
    DoRALinearResults,
    DoRALinearBackward,
    DoRALinearGradients,
    forward=(_forward, _forward_fake),
    backwards=(_backward, _backward_fake),
    keep=_keep,
    autocast=_autocast,
)
