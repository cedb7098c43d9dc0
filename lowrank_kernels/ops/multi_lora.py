"""``lowrank_kernels::multi_lora_linear``: record, check, plan, backends, fakes, autograd, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..cpp import cpp
from ..kernels.lora_tiles import MainTiles
from ..kernels.multi_lora_tiles import (
    AdapterRows,
    MultiLoRATiles,
    MultiStrategy,
    choose_multi_strategy,
    multi_lora_main_tiles,
    multi_lora_tiles,
    tile_capacity,
)
from ..kernels.target import Target
from ..reference.multi_lora import multi_lora_linear_backward_ref, multi_lora_linear_ref
from ..weights import ExpertWeights, Weight, dense, grad_product, owners, product
from ..weights import rows as weight_rows
from ..weights.experts import by_extension, by_library
from .backend import KERNEL_DTYPES
from .batch_plan import check_range
from .library import define_trained
from .lora import cast_products, empty_factor, rows_in, wanted
from .operands import (
    as_rows,
    backend_error,
    device_error,
    factor,
    float32_vector,
    floats_error,
    frozen_error,
    like_rows_of,
    product_error,
    unit_columns,
    vector,
    vector_error,
)
from .planning import OWN, Choosing, Meta, Plan, Planner


class MultiLoRALinear(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.multi_lora_linear`.

    Attributes:
        table, scalings, max_rank, slices: of the stack.
        adapter_ids: (M, J) int32; where a call is only planned, integers as the caller gave them.
        order, bounds, tiles: of the batch's plan; None where rows need not be sorted.
        weights: (M, J) float32.  norm, column_scale: (D, N).  dropout_p: (G,) float64.
        save_p, save_u: P and u are kept for the backward.
    """

    x: Tensor
    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    table: Tensor
    scalings: Tensor
    max_rank: int
    slices: Sequence[int] | None
    adapter_ids: Tensor
    order: Tensor | None
    bounds: Tensor | None
    tiles: Tensor | None
    weights: Tensor | None
    norm: Tensor | None
    column_scale: Tensor | None
    dropout_p: Tensor | None
    dropout_seed: Tensor | None
    save_p: bool
    save_u: bool
    backend: str


class MultiLoRALinearResults(NamedTuple):
    y: Tensor
    p: Tensor | None
    u: Tensor | None


class MultiLoRALinearBackward(NamedTuple):
    """Arguments of the backward. ``needs``: the gradients wanted, of (x, lora_a, lora_b, magnitude, bias)."""

    grad_y: Tensor
    x: Tensor | None
    weight: Weight
    lora_a: Tensor
    lora_b: Tensor
    p: Tensor | None
    u: Tensor | None
    table: Tensor
    scalings: Tensor
    max_rank: int
    slices: Sequence[int] | None
    adapter_ids: Tensor
    order: Tensor | None
    bounds: Tensor | None
    tiles: Tensor | None
    weights: Tensor | None
    norm: Tensor | None
    column_scale: Tensor | None
    dropout_p: Tensor | None
    dropout_seed: Tensor | None
    needs: tuple[bool, ...]
    backend: str


class MultiLoRALinearGradients(NamedTuple):
    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    magnitude: Tensor | None
    bias: Tensor | None


def check_multi_lora_linear(call: MultiLoRALinear) -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    op, x, weight, weights = "multi_lora_linear", call.x, call.weight, call.weights
    error = backend_error(op, call.backend) or floats_error(op, x=x, weight=weight) or product_error(op, x, weight)
    if error is not None:
        return error
    n, k = weight.shape
    if (call.lora_a.shape[-1], call.lora_b.shape[1]) != (k, n):
        return ValueError(
            f"{op}: expected a stack for (K, N) = ({k}, {n}), "
            f"got one for ({call.lora_a.shape[-1]}, {call.lora_b.shape[1]})"
        )
    return (
        _ids_error(op, x, call.adapter_ids, weights, call.magnitude is not None)
        or vector_error(op, "bias", "N", call.bias, n, x.device)
        or device_error(op, x, weight=weight, stack=call.lora_a, adapter_ids=call.adapter_ids, weights=weights)
        or frozen_error(op, x, weight)
    )


def ids_shape(ids: Tensor, x: Tensor) -> tuple[int, ...]:
    """(M, J) of ids that are given as (M, J), (M,), or in x's leading shape."""
    if ids.shape == x.shape[:-1] or ids.dim() == 1:
        return ids.numel(), 1
    return tuple(ids.shape)


def _ids_error(op: str, x: Tensor, ids: Any, weights: Any, has_dora: bool) -> Exception | None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        said = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        return TypeError(f"{op}: expected adapter_ids to be a tensor of integers, got {said}")
    if ids.dim() not in (1, 2) and ids.shape != x.shape[:-1]:
        return ValueError(f"{op}: expected adapter_ids of shape (M,) or (M, J), got {tuple(ids.shape)}")
    if ids.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return TypeError(f"{op}: expected adapter_ids of a signed integer dtype or uint8, got {ids.dtype}")
    shape, rows = ids_shape(ids, x), x.shape[:-1].numel()
    if shape[0] != rows:
        return ValueError(
            f"{op}: expected adapter_ids of x's leading shape, {tuple(x.shape[:-1])}, {rows} rows in all, "
            f"got {shape[0]} rows"
        )
    if shape[1] == 0:
        return ValueError(f"{op}: expected adapter_ids (M, J) with J of 1 or more, got {shape}")
    if weights is not None and not (isinstance(weights, Tensor) and weights.is_floating_point()):
        said = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        return TypeError(f"{op}: expected weights to be a tensor of a floating dtype or None, got {said}")
    if weights is not None and weights.shape != shape:
        return ValueError(f"{op}: expected weights of adapter_ids' shape (M, J) = {shape}, got {tuple(weights.shape)}")
    if weights is not None and weights.requires_grad:
        return ValueError(f"{op}: expected weights that do not require grad; detach them")
    if has_dora and (weights is not None or shape[1] > 1):
        return ValueError(
            f"{op}: expected one adapter a row, without weights, since the stack holds DoRA adapters, whose columns "
            f"are scaled and do not add up; got (M, J) = {shape}"
        )
    return None


def check_stack_scale(
    norm_and_scale: tuple[Tensor, Tensor] | None, magnitude: Tensor | None, op: str = "multi_lora_linear"
) -> None:
    """Raise for what is neither None nor the (n, g) of a stack's magnitudes."""
    if norm_and_scale is None or magnitude is None:
        return
    if not isinstance(norm_and_scale, tuple) or len(norm_and_scale) != 2:
        raise TypeError(f"{op}: expected norm_and_scale to be a pair (n, g) or None, got {norm_and_scale!r:.60}")
    for name, t in zip(("n", "g"), norm_and_scale, strict=True):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.shape != magnitude.shape:
            got = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"{op}: expected {name} of norm_and_scale of shape (D, N) = {tuple(magnitude.shape)} and a floating "
                f"dtype, got {got}"
            )


# --------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class MultiTiles:
    """For Triton: how the base product is made, and the tiles of products with factors by the width of the factor."""

    strategy: MultiStrategy
    main: MainTiles
    by_width: dict[int, MultiLoRATiles]


def _take_tiles(c: Choosing, call: Any, rows: Meta, settled: tuple[tuned.Fields, str]) -> None:
    n, k = call.weight.shape
    adapters, max_rank, slices = call.table.shape[-2], call.max_rank, tuple(call.slices or (n,))
    rows = rows.as_operand()
    sizes = rows.shape[0], k, n, max_rank, adapters
    aligned = rows.describable and call.weight.describable and call.weight.format == "dense"
    main = multi_lora_main_tiles(c.target, rows.shape[0], rows.dtype, aligned)
    factor = call.lora_b.as_operand()
    begins = list(itertools.accumulate(slices, initial=0))[:-1]  # of each slice's columns of B
    described = aligned and factor.describable and all(b * factor.dtype.itemsize % 16 == 0 for b in begins)
    one = ids_shape_of(call)[1] == 1 and max_rank > 0
    strategy = choose_multi_strategy(
        c.target, *sizes, rows.dtype, aligned=described and one, settled=settled[0].get("strategy")
    )
    capacity = tile_capacity(rows.shape[0], adapters)
    widths = {k, n, *slices}
    by_width = {w: multi_lora_tiles(c.target, capacity, w, max_rank, rows.dtype) for w in widths}
    source = settled[1] if settled[0].get("strategy") == strategy else f"rule: roofline of {c.target.arch}"
    c.take("tiles", MultiTiles(strategy, main, by_width), source, strategy)


def ids_shape_of(call: Any) -> tuple[int, ...]:
    ids: Any = call.adapter_ids
    x = call.x if hasattr(call, "save_p") else call.grad_y
    if tuple(ids.shape) == tuple(x.shape[:-1]) or len(ids.shape) == 1:
        return x.rows, 1
    return tuple(ids.shape)


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    x, weight, ids = call.x, call.weight, call.adapter_ids
    c = Choosing("multi_lora_linear", x, target)
    settled = c.settled("multi_lora_linear", tuned.product_sizes(x.shape, weight.shape))
    backend = c.backend(call.backend, *settled)
    extras = call.weights, call.magnitude, call.dropout_p, call.slices
    simple = not records and ids_shape_of(call)[1] == 1 and all(extra is None for extra in extras[:3])
    if x.empty or weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    elif backend == "cpu":
        c.base(x, weight, *settled)
        if simple:
            c.take("unsorted", True, "rule: the extension sorts rows as it runs")
        whole = x.whole and call.lora_a.whole and call.lora_b.whole and ids.whole and weight.stride[1] == 1
        narrow = all(t is None or t.dtype in KERNEL_DTYPES for t in (call.lora_a, call.lora_b, call.bias))
        known = ids.dtype in (torch.int32, torch.int64) and weight.format == "dense"
        if simple and call.slices is None and whole and narrow and known:
            c.take("direct", True, "rule: no gradient is recorded, and operands are contiguous")
    elif backend == "triton":
        _take_tiles(c, call, x, settled)
    return c.done()


def _decide_backward(call: Any, records: bool, target: Target | None) -> Plan:
    c = Choosing("multi_lora_linear", call.grad_y, target)
    backend = c.backend(call.backend, {}, "")
    if call.grad_y.empty or call.weight.empty:
        c.take("backend", "reference", "rule: nothing to multiply")
    elif backend == "cpu" and call.weight.format == "experts":
        c.base(call.grad_y, call.weight, {}, "", backward=True)
    elif backend == "triton":
        _take_tiles(c, call, call.grad_y, ({}, ""))
    return c.done()


plan_multi_lora_linear = Planner("multi_lora_linear", MultiLoRALinear, _decide, check_multi_lora_linear)
_plan_backward = Planner("multi_lora_linear_backward", MultiLoRALinearBackward, _decide_backward)


# ----------------------------------------------------------------------------------------------------------- backends


def multi_lora_linear_directly(call: MultiLoRALinear, plan: Plan) -> Tensor:
    """y of LoRA adapters, one a row, by the extension's own calls, for what is planned so.

    Raises:
        ValueError: ids out of range.
    """
    x, weight, lora_a, lora_b, _, bias, table, scalings, _, _, ids, *_ = call
    try:
        if plan.base == OWN:
            y: Tensor = cpp.multi_lora_linear_inference(x, weight, lora_a, lora_b, bias, table, scalings, ids)
        else:
            y = product(x, weight, bias)
            cpp.multi_lora_add_(y, x, lora_a, lora_b, table, scalings, ids)
        return y
    except RuntimeError:
        check_range(ids, len(table))
        raise


class _OnCpu:
    """The C++ kernels of a factor."""

    def down(self, x: Tensor, factor: Tensor, rows: AdapterRows, max_rank: int) -> Tensor:
        p: Tensor = cpp.multi_lora_down(
            x, factor, rows.table, max_rank, rows.order, rows.tiles, rows.dropout_p, rows.dropout_seed
        )
        return p

    def up_(
        self, y: Tensor, p: Tensor, factor: Tensor, rows: AdapterRows, *, column_scale: Tensor | None = None,
        bias: Tensor | None = None, out: Tensor | None = None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        cpp.multi_lora_up_(
            y, p, factor, rows.table, rows.scalings, rows.order, rows.tiles, rows.weights, rows.dropout_p,
            rows.dropout_seed, column_scale, bias, out,
        )  # fmt: skip

    def grad(self, big: Tensor, small: Tensor, rows: AdapterRows, factor_rows: int, dtype: torch.dtype) -> Tensor:
        grad: Tensor = cpp.multi_lora_grad(
            big, small, rows.table, rows.scalings, rows.order, rows.bounds, rows.weights, rows.dropout_p,
            rows.dropout_seed, factor_rows, dtype,
        )  # fmt: skip
        return grad


class _OnTriton:
    """The same in Triton."""

    def __init__(self, tiles: MultiTiles) -> None:
        from ..kernels import multi_lora

        self.kernels, self.tiles = multi_lora, tiles.by_width

    def down(self, x: Tensor, factor: Tensor, rows: AdapterRows, max_rank: int) -> Tensor:
        return self.kernels.multi_lora_down(x, factor, rows, max_rank, self.tiles[x.shape[1]])

    def up_(self, y: Tensor, p: Tensor, factor: Tensor, rows: AdapterRows, **options: Any) -> None:
        self.kernels.multi_lora_up_(y, p, factor, rows, self.tiles[y.shape[1]], **options)

    def grad(self, big: Tensor, small: Tensor, rows: AdapterRows, factor_rows: int, dtype: torch.dtype) -> Tensor:
        return self.kernels.multi_lora_grad(big, small, rows, factor_rows, dtype, self.tiles[big.shape[1]])


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


def _rows(call: Any, part: _Slice, j: int) -> AdapterRows:
    """Which rows are whose in the j-th choice of adapters, for a slice."""
    weights = None if call.weights is None else call.weights[:, j].contiguous()
    plan = call.order[j], call.bounds[j], call.tiles[j]
    return AdapterRows(part.table, part.scalings, *plan, weights, call.dropout_p, call.dropout_seed)


def _forward(call: MultiLoRALinear, plan: Plan | None) -> MultiLoRALinearResults:
    plan = plan or plan_multi_lora_linear.known(call)
    x, weight = as_rows(call.x), call.weight
    if plan.backend == "reference":
        y, p, u = multi_lora_linear_ref(
            x, dense(weight), call.lora_a, call.lora_b, call.table, call.scalings, call.adapter_ids, call.bias,
            slices=call.slices, weights=call.weights, column_scale=call.column_scale, dropout_p=call.dropout_p,
            dropout_seed=call.dropout_seed, experts=owners(weight, x.shape[0]),
        )  # fmt: skip
        p = torch.nn.functional.pad(p, (0, call.max_rank - p.shape[-1]))
    else:
        given = call._replace(
            x=unit_columns(x),
            bias=vector(call.bias),
            column_scale=float32_vector(call.column_scale),
            weights=float32_vector(call.weights),
        )
        parts = _slices_of(call.lora_a, call.lora_b, call.table, call.scalings, call.slices)
        if call.order is None:
            y, p, u = _unsorted(given, parts, plan), None, None
        else:
            y, p, u = _sorted(given, parts, plan)
    return MultiLoRALinearResults(like_rows_of(call.x, y), p if call.save_p else None, u if call.save_u else None)


def _base_product(plan: Plan, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, ExpertWeights):
        return weight.product(x, bias, by_extension if plan.base == OWN else by_library)
    if plan.backend == "cpu" and plan.base == OWN:
        y: Tensor = cpp.frozen_product(x, weight, bias)
        return y
    return product(x, weight, bias)


def _unsorted(call: MultiLoRALinear, parts: list[_Slice], plan: Plan) -> Tensor:
    """x Wᵀ + bias, and to each slice s P Bᵀ in one call of the extension, from ids to sum."""
    y = _base_product(plan, call.x, call.weight, call.bias)
    try:
        for part in parts:
            cpp.multi_lora_add_(
                part.of(y), call.x, part.lora_a, part.lora_b, part.table, part.scalings, call.adapter_ids
            )
    except RuntimeError:
        check_range(call.adapter_ids, call.table.shape[-2])
        raise
    return y


def _sorted(call: MultiLoRALinear, parts: list[_Slice], plan: Plan) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, P, u) by kernels that go through the rows adapter by adapter."""
    x, weight, bias, column_scale, max_rank = call.x, call.weight, call.bias, call.column_scale, call.max_rank
    assert call.order is not None
    choices, on_triton = call.order.shape[0], plan.backend == "triton"
    kernels: Any = _OnTriton(plan.tiles) if on_triton else _OnCpu()
    one_kernel = on_triton and plan.tiles.strategy == "one_kernel"
    if one_kernel:
        u = x.new_empty(x.shape[0], weight.shape[0])
    else:  # DoRA's scale comes before the bias
        u = _base_product(plan, x, weight, bias if column_scale is None else None)
    y = torch.empty_like(u) if call.save_u else u
    p = x.new_empty(choices * len(parts), x.shape[0], max_rank) if call.save_p else None
    # Several corrections are added up in float32, so that the sum is rounded once.
    total = u.float() if choices > 1 and max_rank else u
    for i, (j, part) in enumerate(itertools.product(range(choices if max_rank else 0), parts)):
        rows, scale = _rows(call, part, j), part.of(column_scale)
        down = kernels.down(x, part.lora_a, rows, max_rank)
        rows = rows.kept()
        if one_kernel:
            columns = part.columns
            part_weight = weight if columns is None else weight_rows(weight, columns.start, columns.stop)
            kernels.kernels.multi_lora_linear_fwd(
                x, part_weight, down, part.lora_b, rows, call.adapter_ids[:, j].contiguous(), part.of(y),
                plan.tiles.main, column_scale=scale, bias=part.of(bias), u=part.of(u) if call.save_u else None,
            )  # fmt: skip
        else:
            scaled = {} if scale is None else {"column_scale": scale, "bias": part.of(bias)}
            out = part.of(y) if call.save_u else None
            kernels.up_(part.of(total), down, part.lora_b, rows, out=out, dtype=x.dtype, **scaled)
        if p is not None:
            p[i] = _summed(down)
    return y if total is u else total.to(x.dtype), p, u


def _base_grad_product(plan: Plan, grad_y: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, ExpertWeights) and plan.base == OWN:
        return weight.grad_product(grad_y, by_extension)
    return grad_product(grad_y, weight)


def _backward(call: MultiLoRALinearBackward, plan: Plan | None) -> MultiLoRALinearGradients:
    plan = plan or _plan_backward.known(call)
    need_bias = call.needs[4]
    dy, x = unit_columns(as_rows(call.grad_y)), None if call.x is None else unit_columns(as_rows(call.x))
    if plan.backend == "reference":
        grads: tuple[Tensor | None, ...] = multi_lora_linear_backward_ref(
            dy, x, dense(call.weight), call.lora_a, call.lora_b, call.table, call.scalings, call.adapter_ids, p=call.p,
            slices=call.slices, weights=call.weights, column_scale=call.column_scale, norm=call.norm, u=call.u,
            dropout_p=call.dropout_p, dropout_seed=call.dropout_seed, needs=call.needs,
            experts=owners(call.weight, dy.shape[0]),
        )  # fmt: skip
    else:
        given = call._replace(
            grad_y=dy,
            x=x,
            norm=float32_vector(call.norm),
            column_scale=float32_vector(call.column_scale),
            weights=float32_vector(call.weights),
        )
        grads = *_sorted_backward(given, plan), dy.sum(0) if need_bias else None
    grad_x, *others = grads
    if grad_x is not None:
        grad_x = like_rows_of(call.grad_y, grad_x)
    return MultiLoRALinearGradients(grad_x, *others)


def _sorted_backward(call: MultiLoRALinearBackward, plan: Plan) -> tuple[Tensor | None, ...]:
    """(dX, dA, dB, dm): slice by slice, choice by choice, by kernels that go through the rows adapter by adapter."""
    need_x, need_a, need_b, need_m, _ = call.needs
    dy, x, lora_a, lora_b, max_rank = call.grad_y, call.x, call.lora_a, call.lora_b, call.max_rank
    assert call.order is not None  # what may train was sorted
    du, grad_m = dy, None
    if call.column_scale is not None:
        u = call.u if need_m else None
        du, grad_m = _dora_gradients(dy, u, call.table, call.adapter_ids, call.norm, call.column_scale)
    grad_x = _base_grad_product(plan, du, call.weight) if need_x else None
    parts = _slices_of(lora_a, lora_b, call.table, call.scalings, call.slices)
    choices = range(call.order.shape[0] if max_rank and dy.shape[0] else 0)
    # What several corrections add up to is added up in float32, so that it is rounded once.
    several = call.order.shape[0] > 1
    total = grad_x.float() if grad_x is not None and len(parts) * len(choices) > 1 else grad_x
    dtype_a, dtype_b = (torch.float32 if several or t.dtype == torch.float64 else t.dtype for t in (lora_a, lora_b))
    of_a: list[Tensor | None] = [None] * len(parts)
    of_b: list[Tensor | None] = [None] * len(parts)
    kernels: Any = _OnTriton(plan.tiles) if plan.backend == "triton" else _OnCpu()
    for i, (j, (s, part)) in enumerate(itertools.product(choices, enumerate(parts))):
        rows, du_s = _rows(call, part, j), part.of(du)
        kept, down = rows.kept(), None
        if need_x or need_a:
            down = kernels.down(du_s, part.lora_b, kept, max_rank)
        if total is not None:
            kernels.up_(total, down, part.lora_a, rows, dtype=dy.dtype)
        if need_a:
            assert down is not None and x is not None
            of_a[s] = _plus(of_a[s], kernels.grad(x, _summed(down), rows, lora_b.shape[0], dtype_a))
        if need_b:
            assert call.p is not None
            of_b[s] = _plus(of_b[s], kernels.grad(du_s, call.p[i], kept, lora_b.shape[0], dtype_b))
    sliced = call.slices is not None
    return (
        None if total is None else total.to(dy.dtype),
        _joined(of_a, lora_a, sliced, torch.stack) if need_a else None,
        _joined(of_b, lora_b, sliced, lambda of: torch.cat(of, dim=1)) if need_b else None,
        grad_m if need_m else None,
    )


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


def _forward_fake(call: MultiLoRALinear) -> MultiLoRALinearResults:
    x, rows, n = call.x, rows_in(call.x), call.weight.shape[0]
    p = u = x.new_empty(0)
    if call.save_p:
        assert call.order is not None
        p = x.new_empty(call.order.shape[0] * len(call.slices or (0,)), rows, call.max_rank)
    if call.save_u:
        u = x.new_empty(rows, n)
    return MultiLoRALinearResults(x.new_empty(*x.shape[:-1], n), p, u if u is not p else u.clone())


def _backward_fake(call: MultiLoRALinearBackward) -> MultiLoRALinearGradients:
    grad_y = call.grad_y
    n, k = call.weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k),
        empty_factor(call.lora_a),
        empty_factor(call.lora_b),
        grad_y.new_empty(0) if call.norm is None else torch.empty_like(call.norm),
        grad_y.new_empty(n),
    )
    return MultiLoRALinearGradients(*wanted(shapes, call.needs, grad_y))


def _keep(call: MultiLoRALinear, results: MultiLoRALinearResults) -> dict[str, Any]:
    return {
        "x": call.x if call.lora_a.requires_grad else None,
        "p": results.p if call.save_p else None,
        "u": results.u if call.save_u else None,
    }


call_multi_lora_linear = define_trained(
    "multi_lora_linear",
    MultiLoRALinear,
    MultiLoRALinearResults,
    MultiLoRALinearBackward,
    MultiLoRALinearGradients,
    forward=(_forward, _forward_fake),
    backwards=(_backward, _backward_fake),
    keep=_keep,
    autocast=cast_products,
)
