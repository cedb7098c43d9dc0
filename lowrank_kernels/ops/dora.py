"""``lowrank_kernels::dora_weight_norm`` and ``dora_linear``: schemas, checks, backends, fakes, autograd, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import tuned
from ..reference.dora import (
    dora_column_scale_ref,
    dora_linear_backward_ref,
    dora_linear_ref,
    dora_weight_norm_ref,
)
from .backend import KERNEL_DTYPES, resolve_backend, why_not
from .library import define, no_double_backward, unobserved
from .lora import (
    check_lora_linear,
    cpu_down,
    cpu_grad,
    cpu_up_,
    in_dtype_of,
    library_grad,
    library_linear,
    lora_linear_inference,
    own_grad_product,
    own_product,
    rows_in,
)
from .operands import (
    as_rows,
    check_optional_vector,
    check_scaling,
    factor,
    float32_vector,
    is_empty,
    like_rows_of,
    unit_columns,
    vector,
)

_NORM = (
    "dora_weight_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? weight_sq_norm, "
    "Tensor? magnitude, str backend) -> (Tensor, Tensor, Tensor)"
)
_FORWARD = (
    "dora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, Tensor? weight_sq_norm, "
    "Tensor? norm, Tensor? column_scale, Tensor? bias, float scaling, float dropout_p, Tensor? dropout_seed, "
    "bool dropout_base, bool detach_norm, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "dora_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor norm, "
    "Tensor column_scale, Tensor? p, Tensor? u, float scaling, float dropout_p, Tensor? dropout_seed, "
    "bool dropout_base, bool detach_norm, bool[] needs, ScalarType magnitude_dtype, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
Needs = tuple[bool, bool, bool, bool, bool]
"""Which of the gradients of (x, lora_a, lora_b, magnitude, bias) to compute."""


def check_dora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor | None, dropout_p: float
) -> None:
    """Raise ValueError or TypeError, in the op's name, for operands that do not fit together."""
    check_lora_linear(x, weight, lora_a, lora_b, bias, None, dropout_p, op="dora_linear")
    check_magnitude("dora_linear", magnitude, weight)


def check_magnitude(op: str, magnitude: Tensor, weight: Tensor) -> None:
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"{op}: expected magnitude to be a tensor, got {type(magnitude).__name__}")
    check_optional_vector(op, "magnitude", "N", magnitude, weight.shape[0], weight.device, "weight")


def check_dora_weight_norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, weight_sq_norm: Tensor | None, scaling: float,
    op: str = "dora_weight_norm",
) -> None:  # fmt: skip
    """Raise ValueError or TypeError, in the op's name, for operands that do not fit together."""
    check_scaling(op, scaling, getattr(weight, "dtype", torch.float32))
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: expected weight to be a tensor of shape (N, K) and a floating dtype, got {got}")
    if isinstance(lora_a, Tensor) and lora_a.device != weight.device:
        raise ValueError(f"{op}: expected weight and lora_a on one device, got {weight.device} and {lora_a.device}")
    no_rows = weight.detach().new_empty(0, weight.shape[1])
    check_lora_linear(no_rows, weight.detach(), lora_a, lora_b, None, None, 0.0, op=op)
    check_weight_sq_norm(weight, weight_sq_norm, op)


def check_weight_sq_norm(weight: Tensor, weight_sq_norm: Tensor | None, op: str) -> None:
    check_optional_vector(op, "weight_sq_norm", "N", weight_sq_norm, weight.shape[0], weight.device, "weight")


def check_norm_and_scale(norm_and_scale: tuple[Tensor, Tensor] | None, weight: Tensor) -> None:
    if norm_and_scale is None:
        return
    if not isinstance(norm_and_scale, tuple) or len(norm_and_scale) != 2 or any(t is None for t in norm_and_scale):
        raise TypeError(f"dora_linear: expected norm_and_scale to be a pair (n, g) or None, got {norm_and_scale!r:.60}")
    for name, values in zip(("n of norm_and_scale", "g of norm_and_scale"), norm_and_scale, strict=True):
        check_optional_vector("dora_linear", name, "N", values, weight.shape[0], weight.device, "weight")


# --------------------------------------------------------------------------------------------------------------- norm


def _norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
    weight_sq_norm: Tensor | None, magnitude: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = (tuned.factor_sizes, weight.shape, lora_a.shape)
    name = resolve_backend("dora_weight_norm", backend, weight, *sizes)
    if name == "cuda" and lora_a.shape[0] > _LARGEST_CUDA_RANK:
        if backend != "auto":
            raise ValueError(
                f"dora_weight_norm: expected a rank of at most {_LARGEST_CUDA_RANK} for backend 'cuda', "
                f"got {lora_a.shape[0]}; use backend='triton'"
            )
        name = "reference" if why_not("dora_weight_norm", "triton", "cuda", weight.dtype) else "triton"
    if name == "reference" or is_empty(weight):
        wide = dora_weight_norm_ref(weight, lora_a, lora_b, scaling=scaling)
        norm = wide.to(torch.promote_types(weight.dtype, torch.float32))
        if weight_sq_norm is None:
            weight_sq_norm = weight.to(norm.dtype).square().sum(1)
        scale = norm.new_empty(0) if magnitude is None else dora_column_scale_ref(magnitude, norm)
        return norm, weight_sq_norm.to(norm.dtype, copy=True), scale
    weight, lora_a, lora_b = unit_columns(weight), factor(lora_a), factor(lora_b)
    operands = (weight, lora_a, lora_b, scaling, float32_vector(weight_sq_norm), vector(magnitude))
    if name == "triton":
        from ..kernels.dora import dora_norm

        return dora_norm(*operands)
    clusters = name != "cuda" or tuned.choice("dora_weight_norm", weight, *sizes) != "no_clusters"
    norm, sq_norm, scale = torch.ops.lowrank_kernels.dora_norm(*operands, clusters)
    return norm, sq_norm, scale


_LARGEST_CUDA_RANK = 512  # of the CUDA C++ kernel, which keeps A Aᵀ's rows in shared memory


def _norm_fake(weight, lora_a, lora_b, scaling, weight_sq_norm, magnitude, backend):  # type: ignore[no-untyped-def]
    norm = weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))
    return norm, torch.empty_like(norm), norm.new_empty(0) if magnitude is None else torch.empty_like(norm)


def _norm_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, lora_a, lora_b, scaling = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, lora_a, lora_b, output[0])
    ctx.scaling = scaling


def _norm_backward(ctx: Any, grad_norm: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    weight, lora_a, lora_b, norm = ctx.saved_tensors
    if grad_norm is None:
        return (None,) * 7
    row_factor = torch.where(norm == 0, 0.0, grad_norm / norm)
    grad_a, grad_b = _norm_gradients(weight, lora_a, lora_b, ctx.scaling, row_factor)
    return None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None, None, None, None


def _norm_gradients(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, row_factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i c_i ‖V_i‖² / 2, V = W + s B A, with c the row factor: s Bᵀ (c ∘ V) and s (c ∘ V) Aᵀ.

    Only (N, R), (R, K) and (R, R) products: V is never formed. Widened to the row factor's dtype by blocks of rows.
    """
    wide = row_factor.dtype
    a, b = lora_a.to(wide), lora_b.to(wide)
    weighted_b = row_factor[:, None] * b
    grad_a = scaling * scaling * (b.T @ weighted_b) @ a
    grad_b = scaling * scaling * weighted_b @ (a @ a.T)
    rows_at_once = max(1, (1 << 22) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        w = weight[rows].to(wide)
        grad_a = grad_a.addmm_(weighted_b[rows].T, w, alpha=scaling)
        grad_b[rows] += scaling * row_factor[rows, None] * (w @ a.T)
    return grad_a, grad_b


# ------------------------------------------------------------------------------------------------------------- linear


def _forward(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, weight_sq_norm: Tensor | None,
    norm: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, scaling: float, dropout_p: float,
    dropout_seed: Tensor | None, dropout_base: bool, detach_norm: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, P, u, n, g); the last two are empty where they were given, P and u unless ``save``."""
    x2 = as_rows(x)
    name = resolve_backend("dora_linear", backend, x, tuned.product_sizes, x.shape, weight.shape)
    if is_empty(x2, weight):
        name = "reference"
    given = norm is not None
    # The extension's own product makes the norms too: W is read once for both.
    norms_inside = name == "cpu" and not given and own_product(x2, weight, "dora_linear")
    if not given and not norms_inside:
        norm, _, column_scale = _norm(weight, lora_a, lora_b, scaling, weight_sq_norm, magnitude, backend)
    if name == "reference":
        assert column_scale is not None
        y, p, u = dora_linear_ref(
            x2, weight, lora_a, lora_b, column_scale, bias,
            scaling=scaling, dropout_p=dropout_p, dropout_seed=dropout_seed, dropout_base=dropout_base,
        )  # fmt: skip
    else:
        x2, lora_a, lora_b, bias = unit_columns(x2), factor(lora_a), factor(lora_b), vector(bias)
        rest = None
        if dropout_base and dropout_p > 0.0:
            # y = g ∘ (d Wᵀ + s d Aᵀ Bᵀ) + (x - d) Wᵀ + bias with d = drop(x): plain DoRA on d, and what d lost.
            dropped = _drop(x2, dropout_p, dropout_seed, name)
            rest = library_linear(x2 - dropped, weight, bias)
            x2, bias, dropout_p, dropout_seed = dropped, None, 0.0, None
        if norms_inside:
            y, p, u, norm, column_scale = torch.ops.lowrank_kernels.dora_linear_fused(
                x2, weight, lora_a, lora_b, vector(magnitude), float32_vector(weight_sq_norm), bias, scaling,
                dropout_seed, dropout_p, save,
            )  # fmt: skip
        else:
            scale = float32_vector(column_scale)
            assert scale is not None
            y, p, u = _scaled_product(
                x2, weight, lora_a, lora_b, scale, bias, scaling, dropout_p, dropout_seed, save, name
            )
        if rest is not None:
            y = y.add_(rest)
    nothing = x.new_empty(0)
    y = like_rows_of(x, y)
    norm, column_scale = (nothing, nothing.clone()) if given else (norm, column_scale)
    assert norm is not None and column_scale is not None
    return (y, p, u, norm, column_scale) if save else (y, nothing.clone(), nothing.clone(), norm, column_scale)


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


def dora_linear_remembering(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor | None, scaling: float,
    cache: ScaleCache,
) -> Tensor | None:  # fmt: skip
    """y of checked operands without dropout, with g from the cache or into it; None where that is not to be had.

    On a CPU alone, where the hash of a row of W is taken as the row is multiplied: on a GPU, whether it is the same
    would have to be waited for, and n costs the same read of W.
    """
    tensors = (x, weight, lora_a, lora_b, magnitude, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return None
    if not (x.is_cpu and unobserved(tensors)) or is_empty(x, weight):
        return None
    adjacent = x.is_contiguous() and weight.stride(1) == 1 and lora_a.is_contiguous() and lora_b.is_contiguous()
    narrow = torch.float64 not in (lora_a.dtype, lora_b.dtype)
    if not (adjacent and narrow):
        return None
    if resolve_backend("dora_linear", "auto", x, tuned.product_sizes, x.shape, weight.shape) != "cpu":
        return None
    cpp, (g, hashes) = torch.ops.lowrank_kernels, cache.kept
    if own_product(x, weight, "dora_linear"):
        y, new_g, new_hashes = cpp.dora_linear_remembering(
            x, weight, lora_a, lora_b, magnitude, bias, scaling, g, hashes
        )
        if new_hashes.numel():
            cache.kept = (new_g, new_hashes)
        return y
    new_g, new_hashes = cpp.dora_column_scale_remembering(weight, lora_a, lora_b, magnitude, scaling, g, hashes)
    if new_hashes.numel():
        cache.kept = (g, _) = (new_g, new_hashes)
    assert g is not None
    y, _, _ = _scaled_product(as_rows(x), weight, lora_a, lora_b, g, bias, scaling, 0.0, None, False, "cpu")
    return like_rows_of(x, y)


def _drop(x: Tensor, dropout_p: float, dropout_seed: Tensor | None, backend: str) -> Tensor:
    assert dropout_seed is not None
    if backend == "triton":
        from ..kernels.dora import dropout

        return dropout(x, dropout_p, dropout_seed)
    keep = torch.ops.lowrank_kernels.dropout_keep_mask(dropout_seed, x.shape[0], x.shape[1], dropout_p)
    return torch.where(keep, x / (1.0 - dropout_p), 0.0)


def _scaled_product(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, column_scale: Tensor, bias: Tensor | None,
    scaling: float, dropout_p: float, dropout_seed: Tensor | None, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y = g ∘ u + bias, P and u = x Wᵀ + s drop(x) Aᵀ Bᵀ; P and u are only right when ``save``."""
    if backend == "triton":
        from ..kernels.dora import dora_linear_fwd

        return dora_linear_fwd(x, weight, lora_a, lora_b, column_scale, bias, scaling, dropout_p, dropout_seed, save)
    cpp = torch.ops.lowrank_kernels
    if own_product(x, weight, "dora_linear"):
        if dropout_p == 0.0 and not save:
            y = lora_linear_inference(x, weight, lora_a, lora_b, bias, None, scaling, column_scale)
            return y, y, y
        return cpp.lora_linear_fused(
            x, weight, lora_a, lora_b, bias, None, scaling, dropout_seed, dropout_p, column_scale, save
        )
    p = cpu_down(x, lora_a, False, dropout_p, dropout_seed)
    u = library_linear(x, weight, None)
    y = torch.empty_like(u) if save else u
    cpp.dora_up_(u, p, lora_b, scaling, column_scale, bias, y if save else None)
    return y, p, u


def _forward_fake(  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b, magnitude, weight_sq_norm, norm, column_scale, bias, scaling, dropout_p, dropout_seed,
    dropout_base, detach_norm, save, backend,
):  # fmt: skip
    rows, n = rows_in(x), weight.shape[0]
    y, nothing = x.new_empty(*x.shape[:-1], n), x.new_empty(0)
    norms = [nothing, nothing.clone()]
    if norm is None:
        norms = [_norm_fake(weight, lora_a, lora_b, scaling, None, None, backend)[0] for _ in range(2)]
    if not save:
        return y, nothing.clone(), nothing.clone(), *norms
    return y, x.new_empty(rows, lora_a.shape[0]), x.new_empty(rows, n), *norms


def _backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, norm: Tensor,
    column_scale: Tensor, p: Tensor | None, u: Tensor | None, scaling: float, dropout_p: float,
    dropout_seed: Tensor | None, dropout_base: bool, detach_norm: bool, needs: Needs, magnitude_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_a, need_b, need_m, need_bias = needs
    dy = unit_columns(as_rows(grad_y))
    name = resolve_backend("dora_linear", backend, grad_y)
    if name == "reference" or is_empty(dy, weight):
        grads: tuple[Tensor | None, ...] = dora_linear_backward_ref(
            dy, x, weight, lora_a, lora_b, column_scale, norm, p, u,
            scaling=scaling, dropout_p=dropout_p, dropout_seed=dropout_seed, dropout_base=dropout_base,
            detach_norm=detach_norm, needs=needs,
        )  # fmt: skip
    else:
        x2 = None if x is None else unit_columns(as_rows(x))
        through_norm = not detach_norm and (need_a or need_b)
        n, g = float32_vector(norm), float32_vector(column_scale)
        assert n is not None and g is not None
        norm, column_scale = n, g
        grad_x, grad_a, grad_b, grad_m = (_triton_backward if name == "triton" else _cpu_backward)(
            dy, x2, weight, factor(lora_a), factor(lora_b), norm, column_scale, p, u, scaling, dropout_p, dropout_seed,
            dropout_base and dropout_p > 0.0, (need_x, need_a, need_b, need_m or through_norm),
            magnitude_dtype if magnitude_dtype in KERNEL_DTYPES and not through_norm else torch.float32,
        )  # fmt: skip
        if through_norm:
            assert grad_m is not None
            row_factor = torch.where(norm == 0, 0.0, -column_scale * grad_m / norm)
            more_a, more_b = _norm_gradients(weight, lora_a, lora_b, scaling, row_factor)
            grad_a = None if grad_a is None else grad_a + more_a
            grad_b = None if grad_b is None else grad_b + more_b
        grad_a, grad_b = in_dtype_of(grad_a, lora_a), in_dtype_of(grad_b, lora_b)
        grads = (grad_x, grad_a, grad_b, grad_m if need_m else None, dy.sum(0) if need_bias else None)
    grad_x, grad_a, grad_b, grad_m, grad_bias = grads
    if grad_x is not None:
        grad_x = like_rows_of(grad_y, grad_x)
    if grad_m is not None:
        grad_m = grad_m.to(magnitude_dtype)
    return tuple(grad_y.new_empty(0) if g is None else g for g in (grad_x, grad_a, grad_b, grad_m, grad_bias))


def _cpu_backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, norm: Tensor,
    column_scale: Tensor, p: Tensor | None, u: Tensor | None, scaling: float, dropout_p: float,
    dropout_seed: Tensor | None, dropout_base: bool, needs: tuple[bool, bool, bool, bool], _: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dX, dA, dB, dm = Σ_m dY ∘ u / n): Q, dB and dm from one pass over dY and u, and dU = g ∘ dY where it is read."""
    cpp = torch.ops.lowrank_kernels
    need_x, need_a, need_b, need_m = needs
    own = need_x and not dropout_base and own_grad_product(grad_y, weight, "dora_linear")
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
            grad_b = cpu_grad(grad_u, p, None, scaling, True, 0.0, None, lora_b.dtype)
        elif need_x or need_a:
            q = cpu_down(grad_u, lora_b, True, 0.0, None)
    if own:  # g goes into the rows of W as they are packed
        grad_x = cpp.lora_grad_x(grad_y, q, weight, lora_a, None, scaling, dropout_seed, dropout_p, column_scale)
    elif need_x and dropout_base:
        through_mask = library_grad(grad_u - grad_y, weight)
        cpu_up_(through_mask, q, lora_a, False, None, scaling, 0.0, None)
        grad_x = library_grad(grad_y, weight).add_(_drop(through_mask, dropout_p, dropout_seed, "cpu"))
    elif need_x:
        grad_x = library_grad(grad_u, weight)
        cpu_up_(grad_x, q, lora_a, False, None, scaling, dropout_p, dropout_seed)
    if need_a:
        assert x is not None
        grad_a = cpu_grad(x, q, None, scaling, False, dropout_p, dropout_seed, lora_a.dtype)
    return grad_x, grad_a, grad_b, grad_m if need_m else None


def _triton_backward(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    from ..kernels.dora import dora_linear_bwd

    return dora_linear_bwd(*args)


def _backward_fake(  # type: ignore[no-untyped-def]
    grad_y, x, weight, lora_a, lora_b, norm, column_scale, p, u, scaling, dropout_p, dropout_seed,
    dropout_base, detach_norm, needs, magnitude_dtype, backend,
):  # fmt: skip
    n, k = weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k), torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format),
        torch.empty_like(norm, dtype=magnitude_dtype), grad_y.new_empty(n),
    )  # fmt: skip
    return tuple(shape if need else grad_y.new_empty(0) for shape, need in zip(shapes, needs, strict=True))


# ------------------------------------------------------------------------------------------- registration with torch


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (x, weight, lora_a, lora_b, magnitude, _, norm, column_scale, bias,
     scaling, dropout_p, dropout_seed, dropout_base, detach_norm, save, backend) = inputs  # fmt: skip
    _, p, u, *found = output
    ctx.mark_non_differentiable(p, u, *found)
    ctx.set_materialize_grads(False)
    if norm is None:
        norm, column_scale = found
    needs_norm = not detach_norm and (lora_a.requires_grad or lora_b.requires_grad)
    ctx.save_for_backward(
        x if lora_a.requires_grad else None, weight, lora_a, lora_b, norm, column_scale,
        p if save and lora_b.requires_grad else None,
        u if save and (magnitude.requires_grad or needs_norm) else None,
        dropout_seed,
    )  # fmt: skip
    ctx.options = scaling, dropout_p, dropout_base, detach_norm, backend
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.magnitude_dtype = magnitude.dtype


def _autograd_backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 16
    x, weight, lora_a, lora_b, norm, column_scale, p, u, seed = ctx.saved_tensors
    scaling, dropout_p, dropout_base, detach_norm, backend = ctx.options
    need_x, _, need_a, need_b, need_m, _, _, _, need_bias = ctx.needs_input_grad[:9]
    needs = (need_x, need_a, need_b, need_m, need_bias)
    grads = _call_backward(
        grad_y, x, weight, lora_a, lora_b, norm, column_scale, p, u,
        scaling, dropout_p, seed, dropout_base, detach_norm, needs, ctx.magnitude_dtype, backend,
    )  # fmt: skip
    grad_x, grad_a, grad_b, grad_m, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, grad_a, grad_b, grad_m, None, None, None, grad_bias, *(None,) * 7


def _autocast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    x, weight, lora_a, lora_b, magnitude, sq_norm, norm, column_scale, bias, scaling, *rest = args
    if norm is None:  # of W as it is, not as it is multiplied
        backend = rest[-1]
        with torch.no_grad():
            norm, _, column_scale = call_dora_weight_norm(weight, lora_a, lora_b, scaling, sq_norm, magnitude, backend)
    x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    return x, weight, lora_a, lora_b, magnitude, sq_norm, norm, column_scale, bias, scaling, *rest


call_dora_weight_norm = define(_NORM, _norm, _norm_fake, setup_context=_norm_setup_context, backward=_norm_backward)
call_dora_linear = define(
    _FORWARD, _forward, _forward_fake, setup_context=_setup_context, backward=_autograd_backward, autocast=_autocast
)
_call_backward = define(_BACKWARD, _backward, _backward_fake, **no_double_backward("dora_linear"))
