"""``lowrank_kernels::batch_plan``: which rows of a batch belong to which adapter.

On the CPU the extension's ``plan_batch_`` sorts them (csrc/batch_plan.h); elsewhere, and without the extension, tensor
operations make the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _extension
from ..kernels.multi_lora_tiles import TILE_ROWS, tile_capacity
from .library import define
from .operands import count_error, raise_error


class _Call(NamedTuple):
    adapter_ids: Tensor
    num_adapters: int


class _Results(NamedTuple):
    order: Tensor
    bounds: Tensor
    tiles: Tensor


class BatchPlan(NamedTuple):
    """The rows of a batch, sorted by adapter; int32 on the device of the batch. Shapes depend on M, J and G alone.

    Attributes:
        adapter_ids: (M, J), -1 where there is none.
        order: (J, M) row numbers, adapter by adapter, each adapter's in ascending order; rows without one last.
        bounds: (J, G + 2): adapter i has order[bounds[i] : bounds[i + 1]]; the last range has the rows without one.
        tiles: (J, T, 3): (adapter, first, count) of at most TILE_ROWS rows of one adapter; adapter -1 for rows without
            one, count 0 for unused tiles, which come last.
    """

    adapter_ids: Tensor
    order: Tensor
    bounds: Tensor
    tiles: Tensor


@cache
def _host_planner() -> Any:
    """The extension's planner for CPU tensors; None without the extension."""
    return torch.ops.lowrank_kernels.plan_batch_.default if _extension.has_op("plan_batch_") else None


def _empty(adapter_ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, choices = adapter_ids.shape
    tiles = tile_capacity(rows, num_adapters)
    options: Any = {"dtype": torch.int32, "device": adapter_ids.device}
    return (
        torch.empty(choices, rows, **options),
        torch.empty(choices, num_adapters + 2, **options),
        torch.empty(choices, tiles, 3, **options),
    )


def _plan(adapter_ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    on_host = adapter_ids.device.type == "cpu"
    plan_into = _host_planner() if on_host else None
    if plan_into is None:
        if on_host and adapter_ids.numel():
            check_range(adapter_ids, num_adapters)
        return plan_on_device(adapter_ids, num_adapters)
    parts = _empty(adapter_ids, num_adapters)
    _plan_into(plan_into, adapter_ids, num_adapters, parts)
    return parts


def _plan_into(
    plan_into: Any, adapter_ids: Tensor, num_adapters: int, parts: Sequence[Tensor], op: str = "multi_lora_linear"
) -> None:
    """Write order, bounds and tiles; ids that no adapter has are named in ``op``'s words."""
    try:
        plan_into(adapter_ids, num_adapters, TILE_ROWS, *parts)
    except RuntimeError:
        check_range(adapter_ids, num_adapters, op)
        raise


def check_range(adapter_ids: Tensor, num_adapters: int, op: str = "multi_lora_linear") -> None:
    """Raise ValueError for ids that no adapter has."""
    low, high = (int(v) for v in adapter_ids.aminmax())
    if low < -1 or high >= num_adapters:
        raise ValueError(f"{op}: expected adapter_ids from -1 to {num_adapters - 1}, got {low} to {high}")


def plan_on_device(adapter_ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same plan from tensor operations: no synchronisation, no shape that depends on the ids.

    An id out of range is found by a device-side assertion.
    """
    order, bounds, tiles = [], [], []
    device = adapter_ids.device
    for ids in adapter_ids.unbind(1):
        torch._assert_async(((ids >= -1) & (ids < num_adapters)).all(), "multi_lora_linear: an adapter id out of range")
        key = torch.where(ids < 0, num_adapters, ids)
        rows = key.argsort(stable=True)
        edges = torch.searchsorted(key[rows], torch.arange(num_adapters + 2, device=device, dtype=key.dtype))
        wanted = (edges.diff() + (TILE_ROWS - 1)) // TILE_ROWS
        last = wanted.cumsum(0)
        number = torch.arange(tile_capacity(ids.shape[0], num_adapters), device=device)
        owner = torch.searchsorted(last, number, right=True)
        used = owner <= num_adapters
        owner = owner.clamp(max=num_adapters)
        first = edges[owner] + (number - (last - wanted)[owner]) * TILE_ROWS
        count = (edges[owner + 1] - first).clamp(max=TILE_ROWS)
        tile = torch.stack([torch.where(owner < num_adapters, owner, -1), first, count], dim=1)
        order.append(rows)
        bounds.append(edges)
        tiles.append(torch.where(used[:, None], tile, tile.new_tensor([-1, 0, 0])))
    return tuple(torch.stack(part).to(torch.int32) for part in (order, bounds, tiles))  # type: ignore[return-value]


_call_plan = define(
    "batch_plan", _Call, _Results, lambda call, _: _Results(*_plan(*call)), lambda call: _Results(*_empty(*call))
)


def plan_batch(adapter_ids: Tensor, num_adapters: int) -> BatchPlan:
    """Sort the rows of a batch by adapter, once for all the linears that it goes through.

    Args:
        adapter_ids: (M,), or (M, J) for J adapters a row; integers from -1, for none, to ``num_adapters`` - 1. On the
            CPU a counting sort in C++ plans them; elsewhere tensor operations do, without synchronising.

    Raises:
        TypeError: ids that are not integers.
        ValueError: ids out of range (on the CPU; elsewhere a device-side assertion), another shape.
    """
    ids = as_ids(adapter_ids, "plan_batch")
    raise_error(count_error("plan_batch", "num_adapters", num_adapters, 0))
    if ids.shape[1] == 0:
        raise ValueError(f"plan_batch: expected adapter_ids (M, J) with J of 1 or more, got {tuple(ids.shape)}")
    try:
        return BatchPlan(ids, *_call_plan(_Call(ids, num_adapters)))
    except ValueError:
        check_range(adapter_ids, num_adapters, "plan_batch")  # in the words of the ids as they were given
        raise


_INT32 = torch.iinfo(torch.int32)


def as_ids(adapter_ids: Tensor, op: str = "multi_lora_linear", name: str = "adapter_ids") -> Tensor:
    """(M, J) int32, contiguous, whatever integers they are and with a J or without; none becomes another id."""
    if not isinstance(adapter_ids, Tensor) or adapter_ids.is_floating_point() or adapter_ids.dtype == torch.bool:
        said = adapter_ids.dtype if isinstance(adapter_ids, Tensor) else type(adapter_ids).__name__
        raise TypeError(f"{op}: expected {name} to be a tensor of integers, got {said}")
    if adapter_ids.dim() not in (1, 2):
        raise ValueError(f"{op}: expected {name} of shape (M,) or (M, J), got {tuple(adapter_ids.shape)}")
    ids = adapter_ids
    if ids.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise TypeError(f"{op}: expected {name} of a signed integer dtype or uint8, got {ids.dtype}")
    if ids.dtype == torch.int64:  # beyond int32 they stay out of range instead of wrapping into it
        ids = ids.clamp(_INT32.min, _INT32.max)
    ids = ids.to(torch.int32)
    return (ids if ids.dim() == 2 else ids[:, None]).contiguous()


class BatchPlanner:
    """Plans batches of one size again and again into the same memory: what a captured CUDA graph reads.

    ``plan`` sorts on the host into a pinned buffer and sends it to the device in one copy, on the current stream,
    without synchronising or allocating; the tensors that it returns are always the same. The host buffer is written
    again by the next call: call it once per replay, after the previous copy is done (any synchronisation of a decoding
    step, such as reading its token, is enough).

    Args:
        rows: M.  num_adapters: G.  device: of the batch.
    """

    def __init__(self, rows: int, num_adapters: int, device: torch.device | str = "cpu") -> None:
        self.num_adapters = num_adapters
        sizes = [rows, rows, num_adapters + 2, 3 * tile_capacity(rows, num_adapters)]
        device = torch.device(device)
        self._host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.empty_like(self._host, device=device, pin_memory=False)
        self._host_plan, self._plan = (_parts(memory, sizes) for memory in (self._host, self._device))
        self._ids = self._host[:rows]

    def plan(self, adapter_ids: Tensor) -> BatchPlan:
        """The plan of ``adapter_ids``, (M,) int32 on the CPU.

        Raises:
            ValueError: ids of another size, or out of range.
        """
        if adapter_ids.shape != self._ids.shape:
            raise ValueError(f"BatchPlanner: expected {self._ids.numel()} ids, got shape {tuple(adapter_ids.shape)}")
        self._ids.copy_(adapter_ids)
        ids, *parts = self._host_plan
        plan_into = _host_planner()
        if plan_into is not None:
            _plan_into(plan_into, ids, self.num_adapters, parts, "BatchPlanner")
        else:
            for ours, theirs in zip(parts, plan_batch(ids, self.num_adapters)[1:], strict=True):
                ours.copy_(theirs)
        self._device.copy_(self._host, non_blocking=True)
        return self._plan


def _parts(memory: Tensor, sizes: list[int]) -> BatchPlan:
    """A plan, one adapter a row, whose parts lie one after another in ``memory``."""
    ids, order, bounds, tiles = memory.split(sizes)
    return BatchPlan(ids[:, None], order[None], bounds[None], tiles.view(1, -1, 3))
