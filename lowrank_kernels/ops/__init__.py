"""Ops registered with torch: the only place of the package that registers anything."""

from . import dora, lora, merge

__all__ = ["dora", "lora", "merge"]
