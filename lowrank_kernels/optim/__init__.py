"""Optimizer steps that know the factors."""

from .factors import FactorOptimizer, factor_groups
from .lora_plus import lora_plus, lora_plus_groups
from .lora_pro import LoRAPro
from .lora_rite import LoRARITE

__all__ = [
    "FactorOptimizer",
    "LoRAPro",
    "LoRARITE",
    "factor_groups",
    "lora_plus",
    "lora_plus_groups",
]
