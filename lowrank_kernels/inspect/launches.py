"""Every distinct kernel launch of an op family on a target, as the launchers themselves make it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.target import TARGETS
from .registry import OpFamily
from .triton_internals import gpu_target, intercepted_launches


@dataclass(frozen=True)
class TensorArgument:
    """A tensor that a launch was given."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Launch:
    """One launch, with all that a compiler needs; plain data, so that another process can compile it.

    ``name`` is "<arch> <kernel> <case>" and stays the same when tile choices change.
    """

    name: str
    arch: str
    module: str
    kernel: str
    case: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any] = field(repr=False)
    signature: Mapping[str, str] = field(repr=False)
    constants: Mapping[tuple[int, ...], Any] = field(repr=False)
    attributes: Mapping[tuple[int, ...], Any] = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)

    @property
    def variant(self) -> tuple[Any, ...]:
        """Equal for two launches exactly when they run the same binary."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.arch, self.module, self.kernel, *(repr(sorted(part.items())) for part in parts)

    @property
    def tile(self) -> str:
        """The BLOCK_ constants by letter, as "M128 N256 K64 R16"."""
        return " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in self.arguments.items() if k.startswith("BLOCK_"))

    @property
    def tensors(self) -> dict[str, TensorArgument]:
        return {k: v for k, v in self.arguments.items() if isinstance(v, TensorArgument)}


def _plain(value: Any) -> Any:
    tensor = getattr(value, "base", value)  # what a descriptor describes
    return TensorArgument(tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else value


def recorded_launches(family: OpFamily, arch: str) -> list[Launch]:
    """The launches of all cases of a family, each variant once, in the order of the cases."""
    launches: dict[tuple[Any, ...], Launch] = {}
    for case in family.cases():
        taken: set[str] = set()

        def keep(
            kernel: Any, grid: Any, args: Any, kwargs: Any, request: Any, case: str = case.name, taken: set[str] = taken
        ) -> None:
            parameters = kernel.arg_names
            bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in parameters})
            name = f"{arch} {kernel.__name__} {case}"
            if name in taken:
                name = next(f"{name} #{i}" for i in range(2, 100) if f"{name} #{i}" not in taken)
            taken.add(name)
            launch = Launch(
                name,
                arch,
                kernel.__module__,
                kernel.__name__,
                case,
                tuple(grid),
                {k: _plain(v) for k, v in bound.arguments.items()},
                options={k: v for k, v in kwargs.items() if k not in parameters},
                **request,
            )
            launches.setdefault(launch.variant, launch)

        with intercepted_launches(gpu_target(arch), keep):
            case.run(TARGETS[arch])
    return list(launches.values())
