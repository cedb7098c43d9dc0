"""Starting points of the factors."""

from .factors import INITS, init_factors_
from .lora_ga import estimate_gradients, lora_ga_, lora_ga_factors
from .velora import velora_

__all__ = ["INITS", "estimate_gradients", "init_factors_", "lora_ga_", "lora_ga_factors", "velora_"]
