"""Layers: a frozen linear and its correction."""

from .block_sparse import BlockSparseLinear
from .dora import DoRALinear
from .lora import LoRALinear
from .multi_lora import MultiLoRALinear, use_adapters

__all__ = ["BlockSparseLinear", "DoRALinear", "LoRALinear", "MultiLoRALinear", "use_adapters"]
