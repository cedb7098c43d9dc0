"""Launches and memory traffic of a piece of code, counted on a CPU: Triton kernels in the interpreter, and aten ops.

The unit is the distinct byte: within one launch a byte counts once as read and once as written, however often it is
touched. That is the traffic of a device whose caches lose nothing within a launch and keep nothing across launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .triton_internals import INTERPRETED, watched_interpreter


class AccessFault(Exception):
    """A kernel touched memory that it was not given, or used an atomic."""


@dataclass(frozen=True)
class Traffic:
    """Distinct bytes of one tensor in one launch."""

    read: int
    written: int


@dataclass(frozen=True)
class CountedLaunch:
    """A kernel launch, or an aten op, with the traffic of each of its tensors by name."""

    name: str
    tensors: dict[str, Traffic]

    @property
    def nbytes(self) -> int:
        return sum(t.read + t.written for t in self.tensors.values())


@dataclass
class MemoryRecord:
    """What ``record_memory`` saw."""

    launches: list[CountedLaunch] = field(default_factory=list)
    saved: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(launch.nbytes for launch in self.launches)

    def saved_bytes(self, beyond: Sequence[Tensor] = ()) -> int:
        """Bytes that autograd saved for backward, each storage once, without the storages of ``beyond``."""
        given = {t.untyped_storage().data_ptr() for t in beyond}
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.saved}
        return sum(nbytes for pointer, nbytes in stored.items() if pointer not in given)

    def table(self) -> str:
        """One line a launch, for people."""
        lines = [f"{launch.nbytes:>12,}  {launch.name}" for launch in self.launches]
        return "\n".join([*lines, f"{self.nbytes:>12,}  in {len(self.launches)} launches"])


class _Region:
    """The elements of one tensor argument, and which of them were touched."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.itemsize = name, tensor.element_size()
        self.start = tensor.data_ptr()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.end = self.start + span * self.itemsize
        # A view leaves gaps between its rows that are not its own.
        inside = torch.zeros(span, dtype=torch.bool)
        inside.as_strided(tensor.shape, tensor.stride(), 0).fill_(True)
        self.inside = inside.numpy()
        self.read, self.written = np.zeros(span, dtype=bool), np.zeros(span, dtype=bool)

    def elements(self, addresses: np.ndarray, nbytes: int) -> tuple[np.ndarray, np.ndarray]:
        """Which addresses are elements of the tensor, and the indices of those."""
        within = (addresses >= self.start) & (addresses <= max(self.end - nbytes, 0))
        index = ((addresses[within] - np.uint64(self.start)) // np.uint64(self.itemsize)).astype(np.int64)
        if nbytes > self.itemsize:
            index = index[:, None] + np.arange(nbytes // self.itemsize)
        owned = self.inside[index] if index.ndim == 1 else self.inside[index].all(axis=1)
        within[within] = owned
        return within, index[owned].ravel()

    def traffic(self) -> Traffic:
        return Traffic(int(self.read.sum()) * self.itemsize, int(self.written.sum()) * self.itemsize)


class _KernelWatch:
    """Follows the interpreter through one launch at a time."""

    def __init__(self, record: MemoryRecord) -> None:
        self.record = record
        self.kernel = ""
        self.regions: list[_Region] = []

    def launch(self, kernel: str, arguments: dict[str, Any]) -> None:
        regions = []
        for name, value in arguments.items():
            tensor = getattr(value, "base", value)  # what a descriptor describes
            if isinstance(tensor, Tensor) and tensor.numel():
                regions.append(_Region(name, tensor))
        self.kernel, self.regions = kernel, regions

    def access(self, kind: str, addresses: Any, mask: Any, nbytes: int) -> None:
        if kind == "atomic":
            raise AccessFault(f"{self.kernel}: an atomic, and results must not depend on the order of programs")
        # The interpreter's masks are integers where a scalar took part.
        taken = np.asarray(addresses)[np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(addresses))].ravel()
        if not taken.size:
            return
        low, high = int(taken.min()), int(taken.max())
        for region in self.regions:
            if high < region.start or low >= region.end:
                continue
            mine, elements = region.elements(taken, nbytes)
            (region.read if kind == "read" else region.written)[elements] = True
            if mine.all():
                return
            taken = taken[~mine]  # another argument's: one may be a view into the memory of another
        raise AccessFault(f"{self.kernel}: a {kind} {self._place(int(taken[0]))}")

    def _place(self, address: int) -> str:
        """Where an address outside of every argument lies, in words."""
        for region in self.regions:
            if region.start <= address < region.end:
                return f"between the rows of {region.name}, which is a view"
        nearest = min(self.regions, key=lambda r: min(abs(address - r.start), abs(address - r.end)), default=None)
        if nearest is None:
            return "without any tensor argument"
        past = address - nearest.end
        where = f"{past} bytes past the end" if past >= 0 else f"{nearest.start - address} bytes before the start"
        return f"outside of every argument, {where} of {nearest.name}"

    def done(self) -> None:
        traffic: dict[str, Traffic] = {}
        for region in self.regions:
            traffic[region.name] = region.traffic()
        self.record.launches.append(CountedLaunch(self.kernel.lstrip("_"), traffic))


_FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_local_scalar_dense",
    "is_same_size",
)

_UNREAD = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "zero_", "fill_")


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, an expanded one's once."""
    sizes = (n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s)
    return int(torch.Size(sizes).numel()) * tensor.element_size() if tensor.numel() else 0


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]


class _OpWatch(TorchDispatchMode):
    """Counts every aten op that moves data as a launch that reads its inputs and writes its outputs."""

    def __init__(self, record: MemoryRecord) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = "CompositeExplicitAutograd"
        ours = func.namespace == "lowrank_kernels"
        if ours and torch._C._dispatch_has_kernel_for_dispatch_key(func._schema.name, key):
            # An op of ours in Python is what it launches: run its implementation with this mode still on.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if not outputs:  # it writes arguments alone
            written = zip(func._schema.arguments, args, strict=False)
            outputs = _tensors([v for a, v in written if a.alias_info is not None and a.alias_info.is_write])
        storages = {t.untyped_storage().data_ptr() for t in inputs if t.numel()}
        is_view = not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in storages for t in outputs)
        if name in _FREE or is_view or not sum(t.numel() for t in outputs):
            return result
        # A tensor that is two operands is read once, and one that says what to make is not read at all.
        read = {} if name in _UNREAD else {t.data_ptr(): t for t in sorted(inputs, key=_distinct_bytes)}
        traffic = {f"in{i}": Traffic(_distinct_bytes(t), 0) for i, t in enumerate(read.values())}
        traffic |= {f"out{i}": Traffic(0, _distinct_bytes(t)) for i, t in enumerate(outputs)}
        self.record.launches.append(CountedLaunch(name, traffic))
        return result


@contextlib.contextmanager
def record_memory() -> Iterator[MemoryRecord]:
    """Context that counts launches and bytes of CPU code, and what autograd saves.

    Counted: every aten op that computes (views and allocations are free) and every C++ op of ours, as one launch that
    reads its inputs and writes its outputs; and, under TRITON_INTERPRET=1, every Triton kernel, with the distinct bytes
    that it reads and writes of each argument; masked lanes touch nothing.

    Raises:
        AccessFault: inside the context: a kernel accesses an address outside of its arguments, or between the rows of
            a view; or uses an atomic.
    """
    record = MemoryRecord()
    with contextlib.ExitStack() as stack:
        if INTERPRETED:
            watch = _KernelWatch(record)
            stack.enter_context(watched_interpreter(watch.launch, watch.access, watch.done))

        def pack(tensor: Tensor) -> Tensor:
            record.saved.append(tensor.detach())
            return tensor

        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        stack.enter_context(_OpWatch(record))
        yield record
