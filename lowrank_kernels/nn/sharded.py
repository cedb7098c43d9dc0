"""Weights that another tool holds: in shards (DTensor, FSDP), or off the device (meta)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .matrix import weight_shape


def is_dtensor(tensor: Any) -> bool:
    """True for a DTensor. Told by its method, since torch.distributed.tensor takes half a second to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a tensor: of a DTensor every rank's part, gathered, which every rank has to call."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def fill_(tensor: Any, values: Tensor) -> None:
    """Write whole values into a tensor: into a DTensor rank 0's, of which every rank, which all call this, takes its
    part."""
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def own_part(tensor: Any) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def by_rows_like(weight: Any, part: Tensor) -> Any:
    """The DTensor of which each rank has the rows ``part`` (n,) that belong to its rows of the DTensor ``weight``."""
    return type(weight).from_local(
        part, weight.device_mesh, weight.placements, shape=weight.shape[:1], stride=(1,), run_check=False
    )


def why_not_written(base: Any, *, whole: bool = False) -> str | None:
    """Why a change of the weight of ``base`` in place would fail or be lost just now; None where it stays.

    ``whole``: a change that takes all of the weight at once, and not each rank its own rows.
    """
    weight: Any = base.weight
    if weight.is_meta:
        return "its weight is on the meta device, as of a module that is offloaded; load it first"
    if tuple(weight.shape) != weight_shape(base):
        return (
            f"its weight has the shape {tuple(weight.shape)}, not {weight_shape(base)}: it is a shard; gather it "
            f"first, under FSDP by FullyShardedDataParallel.summon_full_params"
        )
    if is_dtensor(weight):
        if whole:
            return "its weight is sharded; gather the model first"
        if not isinstance(base, nn.Linear):
            return f"its weight is sharded, which only that of an nn.Linear may be, not of a {type(base).__name__}"
        rows = all(p.is_replicate() or p.is_shard(0) for p in weight.placements)
        return None if rows else f"its weight is sharded by {weight.placements}, not by rows"
    if not getattr(base, "_is_fsdp_managed_module", False):
        if isinstance(weight, nn.Parameter):
            return None
        return "its weight is computed from other parameters (pruning, torch.nn.utils.parametrize); make it plain first"
    if not isinstance(weight, nn.Parameter):
        return "its weight is FSDP's view for a forward, which is freed later; use summon_full_params"
    # FSDP1's gathered parameters are written back. FSDP2's, which are plain for the time of a forward, are not.
    if base._fsdp_use_orig_params and not getattr(weight, "_fsdp_flattened", False):
        return "its weight is FSDP's gathered copy, which is freed later; call reshard() on the module that has it"
    return None
