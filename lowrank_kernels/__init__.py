"""Custom kernels for low-rank and sparse adaptation of frozen weights."""

from .functional import dora_linear, dora_weight_norm, lora_linear

__version__ = "0.1.0"

__all__ = ["__version__", "dora_linear", "dora_weight_norm", "lora_linear"]
