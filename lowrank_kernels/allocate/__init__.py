"""Which rank, gate, block or module gets the budget."""

from .alora import ALoRA
from .sora import SoRA, rising, soft_threshold, sora_groups

__all__ = ["ALoRA", "SoRA", "rising", "soft_threshold", "sora_groups"]
