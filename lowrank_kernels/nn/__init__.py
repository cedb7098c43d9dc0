"""Layers: a frozen linear and its correction."""

from .dora import DoRALinear
from .lora import LoRALinear

__all__ = ["DoRALinear", "LoRALinear"]
