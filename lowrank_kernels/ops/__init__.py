"""Ops registered with torch: the only place of the package that registers anything."""

from . import block_sparse, dora, lora, merge

__all__ = ["block_sparse", "dora", "lora", "merge"]
