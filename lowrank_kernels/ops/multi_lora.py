"""``lowrank_kernels::multi_lora_linear``: schema, checks, backends, fakes, autograd, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _extension, tuned
from ..reference.multi_lora import multi_lora_linear_backward_ref, multi_lora_linear_ref
from .backend import KERNEL_DTYPES, resolve_backend
from .batch_plan import check_range
from .library import define, no_double_backward, unobserved
from .lora import (
    Metadata,
    library_grad,
    library_linear,
    own_by_rule,
    own_product,
    rows_in,
)
from .operands import (
    as_rows,
    check_optional_vector,
    factor,
    float32_vector,
    is_empty,
    like_rows_of,
    unit_columns,
    vector,
)

_STACK = "Tensor table, Tensor scalings, int max_rank, int[]? slices"
_PLAN = "Tensor adapter_ids, Tensor? order, Tensor? bounds, Tensor? tiles, Tensor? weights"
_OPTIONS = "Tensor? norm, Tensor? column_scale, Tensor? dropout_p, Tensor? dropout_seed"
_FORWARD = (
    "multi_lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? magnitude, Tensor? bias, "
    f"{_STACK}, {_PLAN}, {_OPTIONS}, bool save_p, bool save_u, str backend) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "multi_lora_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, "
    f"Tensor? p, Tensor? u, {_STACK}, {_PLAN}, {_OPTIONS}, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
Needs = tuple[bool, bool, bool, bool, bool]
"""Which of the gradients of (x, lora_a, lora_b, magnitude, bias) to compute."""


def check_multi_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, bias: Tensor | None,
    weights: Tensor | None, has_dora: bool,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError, in the op's name, for operands that do not fit together.

    ``adapter_ids`` and ``weights`` are (M, J), and M rows are in x.
    """
    op = "multi_lora_linear"
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: expected {name} of a floating dtype, got {tensor.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight of shape (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{op}: expected x of shape (..., K) = (..., {k}), got {tuple(x.shape)}")
    if (lora_a.shape[-1], lora_b.shape[1]) != (k, n):
        raise ValueError(
            f"{op}: expected a stack for (K, N) = ({k}, {n}), got one for ({lora_a.shape[-1]}, {lora_b.shape[1]})"
        )
    rows = x.shape[:-1].numel()
    if adapter_ids.shape[0] != rows:
        raise ValueError(
            f"{op}: expected adapter_ids of x's leading shape, {tuple(x.shape[:-1])}, {rows} rows in all, "
            f"got {adapter_ids.shape[0]} rows"
        )
    if adapter_ids.shape[1] == 0:
        raise ValueError(f"{op}: expected adapter_ids (M, J) with J of 1 or more, got {tuple(adapter_ids.shape)}")
    if weights is not None and not (isinstance(weights, Tensor) and weights.is_floating_point()):
        said = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{op}: expected weights to be a tensor of a floating dtype or None, got {said}")
    if weights is not None and weights.shape != adapter_ids.shape:
        raise ValueError(
            f"{op}: expected weights of adapter_ids' shape (M, J) = {tuple(adapter_ids.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if weights is not None and weights.requires_grad:
        raise ValueError(f"{op}: expected weights that do not require grad; detach them")
    if has_dora and (weights is not None or adapter_ids.shape[1] > 1):
        raise ValueError(
            f"{op}: expected one adapter a row, without weights, since the stack holds DoRA adapters, whose columns "
            f"are scaled and do not add up; got (M, J) = {tuple(adapter_ids.shape)}"
        )
    check_optional_vector(op, "bias", "N", bias, n, x.device)
    others = ("weight", weight), ("stack", lora_a), ("adapter_ids", adapter_ids), ("weights", weights)
    for name, optional in others:
        if optional is not None and optional.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device} like x, got {optional.device}")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{op}: expected x and weight of one dtype, got {x.dtype} and {weight.dtype}; "
            f"cast x, or run under torch.autocast"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: expected a frozen weight, got one that requires grad; "
            f"call weight.requires_grad_(False), or train it with torch.nn.functional.linear"
        )


def check_stack_scale(norm_and_scale: tuple[Tensor, Tensor] | None, magnitude: Tensor | None) -> None:
    """Raise for what is neither None nor the (n, g) of a stack's magnitudes."""
    if norm_and_scale is None or magnitude is None:
        return
    op = "multi_lora_linear"
    if not isinstance(norm_and_scale, tuple) or len(norm_and_scale) != 2:
        raise TypeError(f"{op}: expected norm_and_scale to be a pair (n, g) or None, got {norm_and_scale!r:.60}")
    for name, t in zip(("n", "g"), norm_and_scale, strict=True):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.shape != magnitude.shape:
            got = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"{op}: expected {name} of norm_and_scale of shape (D, N) = {tuple(magnitude.shape)} and a floating "
                f"dtype, got {got}"
            )


# ----------------------------------------------------------------------------------------------------------- backends


@tuned.remembered
def _direct_way(
    forced: str | None, x: Metadata, weight: Metadata, lora_a: Metadata, lora_b: Metadata, ids: Metadata,
    bias: Metadata | None,
) -> str | None:  # fmt: skip
    """How such operands are computed best without the op: "own_product", "library_product", or None: not."""
    (rows, dtype, device), (n, k), height = x, weight[0], lora_a[0][0]
    fit = (
        device.type == "cpu" and dtype in KERNEL_DTYPES and weight[1] is dtype and _extension.available()
        and rows[-1] == k and 0 not in weight[0]
        and lora_a[0] == (height, k) and lora_b[0] == (height, n)
        and ids[0] in (rows[:-1], (rows[:-1].numel(), 1))
        and ids[1] in (torch.int32, torch.int64) and (bias is None or bias[0] == (n,))
        and all(t is None or t[1] in KERNEL_DTYPES for t in (lora_a, lora_b, bias))
        and all(t is None or t[2] == device for t in (weight, lora_a, lora_b, ids, bias))
    )  # fmt: skip
    if not fit:
        return None
    chosen = forced
    if chosen == tuned.TABLE:
        chosen = tuned.settled("multi_lora_linear", "cpu", dtype, tuned.product_sizes, rows, weight[0])
    if chosen == "reference":
        return None
    return "own_product" if own_by_rule(chosen, dtype, rows, weight[0]) else "library_product"


def multi_lora_linear_directly(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, table: Tensor, scalings: Tensor, ids: Tensor,
    bias: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """y of LoRA adapters, one a row, past this package's op: the C++ kernels' own calls on a CPU, where no gradient is
    recorded and nobody notices; None anywhere else. Operands are checked and settled once for all of their metadata.

    Raises:
        ValueError: ids out of range.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        if torch.is_grad_enabled() and (
            weight.requires_grad or x.requires_grad or lora_a.requires_grad or lora_b.requires_grad
            or (bias is not None and bias.requires_grad)
        ):  # fmt: skip
            return None
        way = _direct_way(
            tuned.forced.get("multi_lora_linear", tuned.TABLE),
            (x.shape, x.dtype, x.device), (weight.shape, weight.dtype, weight.device),
            (lora_a.shape, lora_a.dtype, lora_a.device), (lora_b.shape, lora_b.dtype, lora_b.device),
            (ids.shape, ids.dtype, ids.device), None if bias is None else (bias.shape, bias.dtype, bias.device),
        )  # fmt: skip
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    adjacent = (
        way is not None and x.is_contiguous() and weight.stride(1) == 1 and lora_a.is_contiguous()
        and lora_b.is_contiguous() and ids.is_contiguous()
    )  # fmt: skip
    if not adjacent or not unobserved((x, weight, lora_a, lora_b, ids, bias)):
        return None
    try:
        if way == "own_product":
            return torch.ops.lowrank_kernels.multi_lora_linear_inference(
                x, weight, lora_a, lora_b, bias, table, scalings, ids
            )
        y = library_linear(x, weight, bias)
        torch.ops.lowrank_kernels.multi_lora_add_(y, x, lora_a, lora_b, table, scalings, ids)
        return y
    except RuntimeError:
        check_range(ids, len(table))
        raise


def _kernels(name: str) -> Any:
    """Where ``multi_lora_down``, ``multi_lora_up_`` and ``multi_lora_grad`` of a backend are, with one signature."""
    if name == "triton":
        from ..kernels import multi_lora

        return multi_lora
    return torch.ops.lowrank_kernels


def _summed(parts: Tensor) -> Tensor:
    """A down-projection from its splits: (M, largest rank); the C++ one has no splits."""
    return parts if parts.dim() == 2 else parts[0] if parts.shape[0] == 1 else parts.sum(0)


class _Slice(NamedTuple):
    """A slice of the outputs, as the kernels see it: a linear of its own, with the same rows and ids."""

    columns: slice | None  # None: all of them
    lora_a: Tensor
    lora_b: Tensor
    table: Tensor
    scalings: Tensor

    def of(self, t: Tensor | None) -> Any:
        """Its columns of a tensor (..., N)."""
        return t if t is None or self.columns is None else t[..., self.columns]


def _slices_of(
    lora_a: Tensor, lora_b: Tensor, table: Tensor, scalings: Tensor, slices: Sequence[int] | None
) -> list[_Slice]:
    if slices is None:
        return [_Slice(None, factor(lora_a), factor(lora_b), table, scalings)]
    lora_a = (lora_a.float() if lora_a.dtype == torch.float64 else lora_a).contiguous()
    lora_b, found, begin = factor(lora_b), [], 0
    for s, width in enumerate(slices):
        columns = slice(begin, begin + width)
        found.append(_Slice(columns, lora_a[s], lora_b[:, columns], table[s], scalings[s]))
        begin += width
    return found


def _column(weights: Tensor | None, j: int) -> Tensor | None:
    return None if weights is None else weights[:, j].contiguous()


def _forward(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, bias: Tensor | None,
    table: Tensor, scalings: Tensor, max_rank: int, slices: Sequence[int] | None,
    adapter_ids: Tensor, order: Tensor | None, bounds: Tensor | None, tiles: Tensor | None, weights: Tensor | None,
    norm: Tensor | None, column_scale: Tensor | None, dropout_p: Tensor | None, dropout_seed: Tensor | None,
    save_p: bool, save_u: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x2 = as_rows(x)
    name = resolve_backend("multi_lora_linear", backend, x, tuned.product_sizes, x.shape, weight.shape)
    if name == "reference" or is_empty(x2, weight):
        y, p, u = multi_lora_linear_ref(
            x2, weight, lora_a, lora_b, table, scalings, adapter_ids, bias,
            slices=slices, weights=weights, column_scale=column_scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
        )  # fmt: skip
        p = torch.nn.functional.pad(p, (0, max_rank - p.shape[-1]))
    else:
        x2, parts = unit_columns(x2), _slices_of(lora_a, lora_b, table, scalings, slices)
        bias, column_scale, weights = vector(bias), float32_vector(column_scale), float32_vector(weights)
        own = None if column_scale is not None else bias  # DoRA's scale comes before the bias
        if order is None or tiles is None:
            u = _base_product(name, x2, weight, own)
            for part in parts:
                _add_unplanned(part, u, x2, adapter_ids)
            return like_rows_of(x, u), x.new_empty(0), x.new_empty(0)
        kernels, choices = _kernels(name), order.shape[0]
        one_kernel = (
            name == "triton" and choices == 1 and max_rank
            and kernels.multi_lora_strategy(
                x2, weight, [part.lora_b for part in parts], max_rank, table.shape[-2]
            ) == "one_kernel"
        )  # fmt: skip
        u = x2.new_empty(x2.shape[0], weight.shape[0]) if one_kernel else _base_product(name, x2, weight, own)
        y = torch.empty_like(u) if save_u else u
        p = x.new_empty(choices * len(parts), x2.shape[0], max_rank) if save_p else x.new_empty(0)
        # Several corrections are added up in float32, so that the sum is rounded once.
        total = u.float() if choices > 1 and max_rank else u
        for i, (j, part) in enumerate(itertools.product(range(choices if max_rank else 0), parts)):
            down = kernels.multi_lora_down(
                x2, part.lora_a, part.table, max_rank, order[j], tiles[j], dropout_p, dropout_seed
            )
            w, scale = _column(weights, j), part.of(column_scale)
            if one_kernel:
                kernels.multi_lora_linear_fwd(
                    x2, weight if part.columns is None else weight[part.columns], down, part.lora_b, part.table,
                    part.scalings, adapter_ids[:, j].contiguous(), w, scale, part.of(bias), part.of(y),
                    part.of(u) if save_u else None,
                )  # fmt: skip
            else:
                rounding = {} if name == "cpu" else {"dtype": x.dtype}
                kernels.multi_lora_up_(
                    part.of(total), down, part.lora_b, part.table, part.scalings, order[j], tiles[j], w, None, None,
                    scale, None if scale is None else part.of(bias), part.of(y) if save_u else None, **rounding,
                )  # fmt: skip
            if save_p:
                p[i] = _summed(down)
        if total is not u:
            y = total.to(x.dtype)
    return (
        like_rows_of(x, y),
        p if save_p else x.new_empty(0),
        u if save_u else x.new_empty(0),
    )


def _base_product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if name == "cpu" and own_product(x, weight, "multi_lora_linear"):
        return torch.ops.lowrank_kernels.frozen_linear(x, weight, bias)
    return library_linear(x, weight, bias)


def may_stay_unplanned(x: Tensor, adapter_ids: Tensor, backend: str) -> bool:
    """Whether plain corrections of these rows need no plan beforehand: the C++ kernels then plan as they run."""
    return adapter_ids.shape[1] == 1 and resolve_backend("multi_lora_linear", backend, x) == "cpu"


def _add_unplanned(part: _Slice, y: Tensor, x: Tensor, adapter_ids: Tensor) -> None:
    """y += s P Bᵀ in one call of the extension, from ids to sum."""
    try:
        torch.ops.lowrank_kernels.multi_lora_add_(
            part.of(y), x, part.lora_a, part.lora_b, part.table, part.scalings, adapter_ids
        )
    except RuntimeError:
        check_range(adapter_ids, len(part.table))
        raise


def _backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, p: Tensor | None,
    u: Tensor | None, table: Tensor, scalings: Tensor, max_rank: int, slices: Sequence[int] | None,
    adapter_ids: Tensor, order: Tensor | None, bounds: Tensor | None, tiles: Tensor | None, weights: Tensor | None,
    norm: Tensor | None, column_scale: Tensor | None, dropout_p: Tensor | None, dropout_seed: Tensor | None,
    needs: Needs, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_a, need_b, need_m, need_bias = needs
    dy = unit_columns(as_rows(grad_y))
    x2 = None if x is None else unit_columns(as_rows(x))
    name = resolve_backend("multi_lora_linear", backend, grad_y)
    if name == "reference" or is_empty(dy, weight):
        grads: tuple[Tensor | None, ...] = multi_lora_linear_backward_ref(
            dy, x2, weight, lora_a, lora_b, table, scalings, adapter_ids, p,
            slices=slices, weights=weights, column_scale=column_scale, norm=norm, u=u,
            dropout_p=dropout_p, dropout_seed=dropout_seed, needs=needs,
        )  # fmt: skip
    else:
        assert order is not None and bounds is not None and tiles is not None  # what may train was planned
        du, grad_m = dy, None
        norm, column_scale, weights = float32_vector(norm), float32_vector(column_scale), float32_vector(weights)
        if column_scale is not None:
            du, grad_m = _dora_gradients(dy, u if need_m else None, table, adapter_ids, norm, column_scale)
        grad_x = library_grad(du, weight) if need_x else None
        parts = _slices_of(lora_a, lora_b, table, scalings, slices)
        choices = range(order.shape[0] if max_rank and dy.shape[0] else 0)
        # What several corrections add up to is added up in float32, so that it is rounded once.
        several = order.shape[0] > 1
        total = grad_x.float() if grad_x is not None and len(parts) * len(choices) > 1 else grad_x
        dtype_a, dtype_b = (torch.float32 if several or t.dtype == torch.float64 else t.dtype for t in (lora_a, lora_b))
        of_a: list[Tensor | None] = [None] * len(parts)
        of_b: list[Tensor | None] = [None] * len(parts)
        kernels = _kernels(name)
        for i, (j, (s, part)) in enumerate(itertools.product(choices, enumerate(parts))):
            w, du_s, down = _column(weights, j), part.of(du), None
            if need_x or need_a:
                down = kernels.multi_lora_down(du_s, part.lora_b, part.table, max_rank, order[j], tiles[j], None, None)
            if total is not None:
                rounding = {} if name == "cpu" else {"dtype": dy.dtype}
                kernels.multi_lora_up_(
                    total, down, part.lora_a, part.table, part.scalings, order[j], tiles[j], w, dropout_p,
                    dropout_seed, None, None, None, **rounding,
                )  # fmt: skip
            if need_a:
                assert down is not None and x2 is not None
                more = kernels.multi_lora_grad(
                    x2, _summed(down), part.table, part.scalings, order[j], bounds[j], w, dropout_p, dropout_seed,
                    lora_b.shape[0], dtype_a,
                )  # fmt: skip
                of_a[s] = _plus(of_a[s], more)
            if need_b:
                assert p is not None
                more = kernels.multi_lora_grad(
                    du_s, p[i], part.table, part.scalings, order[j], bounds[j], w, None, None, lora_b.shape[0], dtype_b
                )
                of_b[s] = _plus(of_b[s], more)
        grad_x = None if total is None else total.to(dy.dtype)
        grad_a = _joined(of_a, lora_a, slices is not None, torch.stack) if need_a else None
        grad_b = _joined(of_b, lora_b, slices is not None, lambda of: torch.cat(of, dim=1)) if need_b else None
        grads = (grad_x, grad_a, grad_b, grad_m, dy.sum(0) if need_bias else None)
    grad_x = grads[0]
    if grad_x is not None:
        grad_x = like_rows_of(grad_y, grad_x)
    return tuple(grad_y.new_empty(0) if g is None else g for g in (grad_x, *grads[1:]))


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _joined(
    of_slices: list[Tensor | None], factor: Tensor, sliced: bool, join: Callable[[list[Any]], Tensor]
) -> Tensor:
    """The slices' gradients as the factor's own; zero where nothing was added up."""
    if of_slices[0] is None:
        return torch.zeros_like(factor, memory_format=torch.contiguous_format)
    return (join(of_slices) if sliced else of_slices[0]).to(factor.dtype)


def _dora_gradients(
    dy: Tensor, u: Tensor | None, table: Tensor, adapter_ids: Tensor, norm: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(dU = g ∘ dY, and with u the magnitudes' gradient (Σ_m dY ∘ u) / n).

    The sums are a product with the 0/1 matrix of which row is whose: in a fixed order, and without synchronising.
    """
    ids = adapter_ids[:, 0]
    dora = torch.where(ids < 0, -1, table.reshape(-1, 3)[ids.clamp(min=0), 2])  # the same in every slice
    scale = torch.cat([column_scale, torch.ones_like(column_scale[:1])])[torch.where(dora < 0, len(column_scale), dora)]
    du = (dy * scale).to(dy.dtype)
    if u is None:
        return du, None
    assert norm is not None
    owner = torch.arange(len(column_scale), device=dora.device)[:, None] == dora[None, :]
    inner = owner.to(norm.dtype) @ (dy.to(norm.dtype) * u.to(norm.dtype))
    return du, torch.where(norm == 0, 0.0, inner / norm)


# ------------------------------------------------------------------------------------------- registration with torch


def _forward_fake(  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b, magnitude, bias, table, scalings, max_rank, slices, adapter_ids, order, bounds, tiles,
    weights, norm, column_scale, dropout_p, dropout_seed, save_p, save_u, backend,
):  # fmt: skip
    rows, n = rows_in(x), weight.shape[0]
    return (
        x.new_empty(*x.shape[:-1], n),
        x.new_empty(order.shape[0] * len(slices or (0,)), rows, max_rank) if save_p else x.new_empty(0),
        x.new_empty(rows, n) if save_u else x.new_empty(0),
    )


def _backward_fake(  # type: ignore[no-untyped-def]
    grad_y, x, weight, lora_a, lora_b, p, u, table, scalings, max_rank, slices, adapter_ids, order, bounds, tiles,
    weights, norm, column_scale, dropout_p, dropout_seed, needs, backend,
):  # fmt: skip
    n, k = weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k), torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format),
        grad_y.new_empty(0) if norm is None else torch.empty_like(norm), grad_y.new_empty(n),
    )  # fmt: skip
    return tuple(shape if need else grad_y.new_empty(0) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    (x, weight, lora_a, lora_b, magnitude, bias, table, scalings, max_rank, slices, ids, order, bounds, tiles, weights,
     norm, column_scale, dropout_p, dropout_seed, save_p, save_u, backend) = inputs  # fmt: skip
    _, p, u = output
    ctx.mark_non_differentiable(p, u)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if lora_a.requires_grad else None, weight, lora_a, lora_b, p if save_p else None, u if save_u else None,
        table, scalings, ids, order, bounds, tiles, weights, norm, column_scale, dropout_p, dropout_seed,
    )  # fmt: skip
    ctx.max_rank, ctx.slices, ctx.backend = max_rank, slices, backend
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.magnitude_dtype = None if magnitude is None else magnitude.dtype


def _autograd_backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 22
    x, weight, lora_a, lora_b, p, u, table, scalings, *rest = ctx.saved_tensors
    need_x, _, need_a, need_b, need_m, need_bias = ctx.needs_input_grad[:6]
    needs = (need_x, need_a, need_b, need_m, need_bias)
    grads = _call_backward(
        grad_y, x, weight, lora_a, lora_b, p, u, table, scalings, ctx.max_rank, ctx.slices, *rest, needs, ctx.backend
    )  # fmt: skip
    grad_x, grad_a, grad_b, grad_m, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    if grad_m is not None:
        grad_m = grad_m.to(ctx.magnitude_dtype)
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, grad_a, grad_b, grad_m, grad_bias, *(None,) * 16


def _autocast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    x, weight, lora_a, lora_b, magnitude, bias, *rest = args
    x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    return x, weight, lora_a, lora_b, magnitude, bias, *rest


call_multi_lora_linear = define(
    _FORWARD, _forward, _forward_fake, setup_context=_setup_context, backward=_autograd_backward, autocast=_autocast
)
_call_backward = define(_BACKWARD, _backward, _backward_fake, **no_double_backward("multi_lora_linear"))
