"""Layers: a frozen linear and its correction."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]
