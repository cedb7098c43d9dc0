"""What is measured and tuned: a module for each family, found by its name, with ``BENCHES`` and ``TUNABLES``."""

from __future__ import annotations

from importlib import import_module

from ...families import NAMES
from .bench import Bench, Inputs, Problem, Provider, Shape, Tunable

_MODULES = [import_module(f"{__name__}.{name}") for name in NAMES]

OPS: dict[str, Bench] = {bench.name: bench for module in _MODULES for bench in module.BENCHES}
"""Benchmark rows by op."""


def tunables(device_type: str) -> dict[str, Tunable]:
    """What there is to choose on such a device, by the name that it is settled by; forwards first."""
    found = [tunable for module in _MODULES for tunable in module.TUNABLES.get(device_type, ())]
    return {tunable.op: tunable for tunable in sorted(found, key=lambda tunable: tunable.training)}


__all__ = ["OPS", "Bench", "Inputs", "Problem", "Provider", "Shape", "Tunable", "tunables"]
