"""Optimizer steps that know the layers they train."""

from .block_adamw import BlockAdamW
from .factors import FactorOptimizer, factor_groups
from .galore import GaLore, galore_groups
from .gmt import GMT
from .lora_plus import lora_plus, lora_plus_groups
from .lora_pro import LoRAPro
from .lora_rite import LoRARITE

__all__ = [
    "GMT",
    "BlockAdamW",
    "FactorOptimizer",
    "GaLore",
    "LoRAPro",
    "LoRARITE",
    "factor_groups",
    "galore_groups",
    "lora_plus",
    "lora_plus_groups",
]
