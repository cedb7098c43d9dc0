"""Whether tensors still hold what they held: told by their storages and version counters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def state_of(*tensors: Tensor) -> tuple[Any, ...]:
    """Differs between two moments when the tensors' values may.

    In-place edits, under ``no_grad`` too, raise the version counter, and moves change the storage; writes through
    ``.data`` or by raw pointer do neither. The weak references keep the storages' addresses taken, so that no later
    storage is mistaken for one of them.
    """
    return tuple(
        (StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.stride(), t._version, t.dtype) for t in tensors
    )


class Memory:
    """What a layer knows of its own tensors: ``clear`` forgets it, and copies and pickles start without."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()
