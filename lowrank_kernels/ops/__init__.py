"""Ops registered with torch: the only place of the package that registers anything."""

from . import batch_plan, block_sparse, dora, lora, merge, multi_lora

__all__ = ["batch_plan", "block_sparse", "dora", "lora", "merge", "multi_lora"]
