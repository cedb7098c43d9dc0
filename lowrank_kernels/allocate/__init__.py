"""Which rank, gate, block or module gets the budget."""

from .alora import ALoRA
from .hetero_lora import HeteroLoRA, add_shortcuts_
from .lamda import LaMDA, spectral_ranks
from .sora import SoRA, rising, soft_threshold, sora_groups

__all__ = [
    "ALoRA",
    "HeteroLoRA",
    "LaMDA",
    "SoRA",
    "add_shortcuts_",
    "rising",
    "soft_threshold",
    "sora_groups",
    "spectral_ranks",
]
