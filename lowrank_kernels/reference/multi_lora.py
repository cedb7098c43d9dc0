"""Many adapters on one frozen weight, one row at a time to each, as the formula says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import keep_threshold, philox_words_ref
from .lora import _accumulation_dtype


class MultiLoRAGradients(NamedTuple):
    """Gradients of :func:`multi_lora_linear_ref`; None where not asked for."""

    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    magnitude: Tensor | None
    bias: Tensor | None


class _Slice(NamedTuple):
    """A slice of the outputs: its columns, and what is the slices' own."""

    number: int
    columns: slice
    lora_a: Tensor
    lora_b: Tensor
    table: Tensor
    scalings: Tensor


def _slices_of(
    lora_a: Tensor, lora_b: Tensor, table: Tensor, scalings: Tensor, slices: Sequence[int] | None
) -> Iterator[_Slice]:
    if slices is None:
        yield _Slice(0, slice(0, lora_b.shape[1]), lora_a, lora_b, table, scalings)
        return
    begin = 0
    for s, width in enumerate(slices):
        columns = slice(begin, begin + width)
        yield _Slice(s, columns, lora_a[s], lora_b[:, columns], table[s], scalings[s])
        begin += width


def _rows_of(
    adapter_ids: Tensor, weights: Tensor | None, adapters: int
) -> list[tuple[int, int, Tensor, Tensor | None]]:
    """(choice j, adapter, its rows, their weights) wherever an adapter has rows."""
    found = []
    for j in range(adapter_ids.shape[1]):
        for adapter in range(adapters):
            rows = (adapter_ids[:, j] == adapter).nonzero().squeeze(1)
            if rows.numel():
                found.append((j, adapter, rows, None if weights is None else weights[rows, j][:, None]))
    return found


def _keep(rows: Tensor, columns: int, p: float, seed: Tensor) -> Tensor:
    """The rows of ``dropout_keep_mask_ref``'s mask that are asked for."""
    words = philox_words_ref(seed.to(rows.device), int(rows.max()) + 1, columns)
    return words[rows] >= keep_threshold(p)


def _dropped(values: Tensor, rows: Tensor, adapter: int, dropout_p: Tensor | None, seed: Tensor | None) -> Tensor:
    p = 0.0 if dropout_p is None else float(dropout_p[adapter])
    if p == 0.0:
        return values
    assert seed is not None
    return torch.where(_keep(rows, values.shape[1], p, seed), values, 0) / (1.0 - p)


def _product(rows: Tensor, weight: Tensor, experts: Tensor | None) -> Tensor:
    """rows Wᵀ; with experts, each row times the weight of its own."""
    if experts is None:
        return rows @ weight.T
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e in experts.unique().tolist():
        mine = (experts == e).nonzero().squeeze(1)
        out = out.index_put((mine,), rows[mine] @ weight[e].T)
    return out


def multi_lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    table: Tensor,
    scalings: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    *,
    slices: Sequence[int] | None = None,
    weights: Tensor | None = None,
    column_scale: Tensor | None = None,
    dropout_p: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row m, whose adapter is i: y_m = g_i ∘ (W x_m + s_i B_i P_m) + bias with P_m = A_i drop_i(x_m).

    g is DoRA's column scale, and 1 for a LoRA adapter; a row without an adapter is W x_m + bias. With J adapters a row,
    y_m = W x_m + Σ_j w_mj s_i(j) B_i(j) P_mj + bias, LoRA alone. With slices of N, each has factors of its own.

    Args:
        x: (M, K).  weight: (N, K).  lora_a: (ΣR, K).  lora_b: (ΣR, N): adapter i has rows start_i : start_i + R_i.
        table: (G, 3) integers: start, rank, and row of ``column_scale``, -1 for a LoRA adapter.
        scalings: (G,).  adapter_ids: (M, J), -1 where there is none.  weights: (M, J) or None for ones.
        column_scale: (D, N).  dropout_p: (G,) float64; the mask is that of ``dropout_keep_mask_ref`` over all of x.
        slices: widths of S slices of N. ``lora_a`` is then (S, ΣR, K), ``table`` (S, G, 3), ``scalings`` (S, G), and
            slice s of an adapter has its rows of ``lora_b`` in the slice's columns.
        experts: (M,) integers: ``weight`` is then (E, N, K), and row m is multiplied by that of its expert.

    Returns:
        y (M, N), P (J S, M, largest rank), zero past a row's own rank, and u (M, N), y before g and bias; in x's dtype.
    """
    acc = _accumulation_dtype(x.dtype)
    wide = x.to(acc)
    u = _product(wide, weight.to(acc), experts)
    found = _rows_of(adapter_ids, weights, table.shape[-2])
    every = list(_slices_of(lora_a, lora_b, table, scalings, slices))
    max_rank = int(table[..., 1].max()) if table.numel() else 0
    p = u.new_zeros(adapter_ids.shape[1] * len(every), x.shape[0], max_rank)
    scale = torch.ones_like(u)
    for (j, adapter, rows, row_weights), of in itertools.product(found, every):
        start, rank, dora = (int(v) for v in of.table[adapter])
        a, b = (f[start : start + rank].to(x.dtype).to(acc) for f in (of.lora_a, of.lora_b))
        down = _dropped(wide[rows], rows, adapter, dropout_p, dropout_seed) @ a.T
        p[j * len(every) + of.number, rows, :rank] = down
        correction = of.scalings[adapter].to(acc) * (down @ b)
        u[rows, of.columns] += correction if row_weights is None else row_weights.to(acc) * correction
        if dora >= 0:
            assert column_scale is not None
            scale[rows] = column_scale[dora].to(acc)
    y = scale * u
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), p.to(x.dtype), u.to(x.dtype)


def multi_lora_linear_backward_ref(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    table: Tensor,
    scalings: Tensor,
    adapter_ids: Tensor,
    *,
    p: Tensor | None,
    slices: Sequence[int] | None = None,
    weights: Tensor | None = None,
    column_scale: Tensor | None = None,
    norm: Tensor | None = None,
    u: Tensor | None = None,
    dropout_p: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    needs: tuple[bool, ...] = (True, True, True, True, True),
    experts: Tensor | None = None,
) -> MultiLoRAGradients:
    """With dU = g ∘ dY and, over the rows of adapter i, Q = dU B_i: dX = dU W + drop_i'(s_i w Q A_i),
    dA_i = s_i (w Q)ᵀ drop_i(x), dB_i = s_i dUᵀ (w P), dm_i = (Σ_m dY ∘ u) / n_i, and dbias = Σ_m dY over all rows.

    Args:
        norm: (D, N), the n of g = m / n.
        needs: which of (x, lora_a, lora_b, magnitude, bias) to compute.
        experts: as of :func:`multi_lora_linear_ref`.
    """
    dtype = grad_y.dtype
    acc = _accumulation_dtype(dtype)
    dy = grad_y.to(acc)
    need_x, need_a, need_b, need_m, need_bias = needs
    found = _rows_of(adapter_ids, weights, table.shape[-2])
    every = list(_slices_of(lora_a, lora_b, table, scalings, slices))
    du = dy.clone()
    grad_m = None if column_scale is None else torch.zeros_like(column_scale, dtype=acc)
    for _, adapter, rows, _ in found:
        dora = int(every[0].table[adapter, 2])
        if dora >= 0:
            assert column_scale is not None and norm is not None and grad_m is not None
            du[rows] = column_scale[dora].to(acc) * dy[rows]
            if need_m:
                assert u is not None
                inner = (dy[rows] * u[rows].to(acc)).sum(0)
                grad_m[dora] = torch.where(norm[dora] == 0, 0.0, inner / norm[dora].to(acc))
    grad_x = _product(du, weight.to(acc).mT, experts) if need_x else None
    grad_a = lora_a.new_zeros(lora_a.shape, dtype=acc) if need_a else None
    grad_b = lora_b.new_zeros(lora_b.shape, dtype=acc) if need_b else None
    for (j, adapter, rows, row_weights), of in itertools.product(found, every):
        start, rank, _ = (int(v) for v in of.table[adapter])
        own = slice(start, start + rank)
        a, b = (f[own].to(dtype).to(acc) for f in (of.lora_a, of.lora_b))
        scale = of.scalings[adapter].to(acc) * (1.0 if row_weights is None else row_weights.to(acc))
        q = du[rows, of.columns] @ b.T
        if grad_x is not None:
            grad_x[rows] += _dropped(scale * q @ a, rows, adapter, dropout_p, dropout_seed)
        if grad_a is not None:
            assert x is not None
            into = grad_a if slices is None else grad_a[of.number]
            into[own] += (scale * q).T @ _dropped(x[rows].to(acc), rows, adapter, dropout_p, dropout_seed)
        if grad_b is not None:
            assert p is not None
            of_rows = p[j * len(every) + of.number, rows, :rank].to(acc)
            grad_b[own, of.columns] += (scale * of_rows).T @ du[rows, of.columns]
    return MultiLoRAGradients(
        None if grad_x is None else grad_x.to(dtype),
        None if grad_a is None else grad_a.to(lora_a.dtype),
        None if grad_b is None else grad_b.to(lora_b.dtype),
        grad_m if need_m else None,
        dy.sum(0).to(dtype) if need_bias else None,
    )
