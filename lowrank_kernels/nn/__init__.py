"""Layers: a frozen linear and its correction."""

from .block_sparse import BlockSparseLinear
from .dora import DoRALinear
from .lora import LoRALinear

__all__ = ["BlockSparseLinear", "DoRALinear", "LoRALinear"]
