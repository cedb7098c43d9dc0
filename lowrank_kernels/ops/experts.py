"""Which rows a router has sent to which expert, and to which of its adapters: the plan of a batch, made once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batch_plan import BatchPlan, as_ids, plan_batch
from .operands import count_error, raise_error

_OP = "plan_experts"


class RoutedRows(NamedTuple):
    """The rows of a batch, sorted by expert, and among those of an expert by adapter.

    Attributes:
        segments: the plan of the (expert, adapter) segments. With G adapters an expert, adapter g of expert e is
            segment e (G + 1) + g, and e (G + 1) + G has the expert's rows without an adapter; with ``num_adapters``
            None, segment e is expert e.
        bounds: (E + 1,) int32: expert e has the rows ``order[bounds[e] : bounds[e + 1]]``.
        num_adapters: G, or None.
        is_sorted: rows come in that order already.
    """

    segments: BatchPlan
    bounds: Tensor
    num_adapters: int | None
    is_sorted: bool = False

    @property
    def order(self) -> Tensor:
        """(M,) int32 row numbers, expert by expert, each segment's in ascending order."""
        return self.segments.order[0]

    def sorted(self) -> RoutedRows:
        """The plan of the same rows once they are taken in that order: of ``x[rows.order]``."""
        ids, order, bounds, tiles = self.segments
        in_order = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)[None]
        return self._replace(segments=BatchPlan(ids[order[0].long()], in_order, bounds, tiles), is_sorted=True)

    @property
    def experts(self) -> Tensor:
        """(M,) int64: the expert of each row."""
        ids = self.segments.adapter_ids[:, 0].long()
        return ids if self.num_adapters is None else ids // (self.num_adapters + 1)


def plan_experts(
    expert_ids: Tensor, num_experts: int, adapter_ids: Tensor | None = None, num_adapters: int | None = None
) -> RoutedRows:
    """Sort routed rows by expert, and by adapter where experts have several, for all products over them.

    Args:
        expert_ids: (M,) integers from 0 to E - 1, in any order.
        num_experts: E.
        adapter_ids: (M,) integers from -1, for none, to G - 1.
        num_adapters: G, where ``adapter_ids`` are given.

    Raises:
        TypeError, ValueError: as :func:`plan_batch`; ids that are not (M,); on the CPU, ids out of range (elsewhere a
            device-side assertion).
    """
    raise_error(count_error(_OP, "num_experts", num_experts, 1))
    if (adapter_ids is None) != (num_adapters is None):
        raise ValueError(f"{_OP}: expected adapter_ids and num_adapters together, got one of them")
    experts = as_ids(expert_ids, _OP, "expert_ids")
    if expert_ids.dim() != 1:
        raise ValueError(f"{_OP}: expected expert_ids of shape (M,), got {tuple(expert_ids.shape)}")
    valid, segments, count = (experts >= 0) & (experts < num_experts), experts, 1
    adapters = None
    if adapter_ids is not None and num_adapters is not None:
        raise_error(count_error(_OP, "num_adapters", num_adapters, 0))
        adapters = as_ids(adapter_ids, _OP)
        if adapters.shape != experts.shape:
            raise ValueError(
                f"{_OP}: expected adapter_ids of expert_ids' shape {tuple(expert_ids.shape)}, "
                f"got {tuple(adapter_ids.shape)}"
            )
        count = num_adapters + 1
        segments = experts * count + torch.where(adapters < 0, num_adapters, adapters)
        valid = valid & (adapters >= -1) & (adapters < num_adapters)
    try:
        # What is out of range stays so, as the planner finds it; no expert is -1, either.
        made = plan_batch(torch.where(valid, segments, torch.iinfo(torch.int32).max), num_experts * count)
    except ValueError:
        _check_range("expert_ids", experts, 0, num_experts)
        if adapters is not None:
            _check_range("adapter_ids", adapters, -1, count - 1)
        raise
    return RoutedRows(made, made.bounds[0, : num_experts * count + 1 : count].contiguous(), num_adapters)


def _check_range(name: str, ids: Tensor, least: int, end: int) -> None:
    low, high = (int(v) for v in ids.aminmax())
    if low < least or high >= end:
        raise ValueError(f"{_OP}: expected {name} from {least} to {end - 1}, got {low} to {high}")
