"""What a family says of itself to be inspected, compiled and traced: ``FAMILY`` in its module of this folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..families import NAMES
from ..kernels.target import Target

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
"""What every kernel variant is compiled for."""


@dataclass(frozen=True)
class LaunchCase:
    """One call of a family's launchers, on meta tensors: it launches kernels and computes nothing."""

    name: str
    run: Callable[[Target], object]


@dataclass(frozen=True)
class KernelWork:
    """What a launch of a kernel does, from its arguments by name.

    Attributes:
        flops: multiplications and additions of its products.
        in_place: tensor arguments that are read and written: they count twice in the launch's bytes.
        matrix: its half-precision products must run on matrix units.
        main: it multiplies by the frozen weight: it must use the newest matrix instructions and copies of its target.
    """

    flops: Callable[[Mapping[str, Any]], float]
    in_place: tuple[str, ...] = ()
    matrix: bool = True
    main: bool = False


@dataclass(frozen=True)
class Traced:
    """A call of the public function for graph capture: ``function(*tensors)`` on a device of the caller's choice."""

    name: str
    function: Callable[..., Tensor]
    tensors: Callable[[str], tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpFamily:
    """What the tools need to know of one op family.

    Attributes:
        name: as in ``families.py``.
        cases: launches that together make every kernel variant that the tile rule can choose.
        work: by kernel name.
        traced: calls that must be traceable without a device; tensors that require grad are differentiated.
        choices: for common shapes, ("M = 16, R = 16", "fused: fused 12.3 µs, ...") on a target.
    """

    name: str
    cases: Callable[[], Iterable[LaunchCase]] = lambda: ()
    work: Mapping[str, KernelWork] = field(default_factory=dict)
    traced: tuple[Traced, ...] = ()
    choices: Callable[[Target], Iterable[tuple[str, str]]] = lambda target: ()


def family(name: str) -> OpFamily:
    """The family of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"inspect: expected an op family of {', '.join(NAMES)}, got {name!r}")
    found: OpFamily = importlib.import_module(f"{__package__}.{name}").FAMILY
    return found
