"""Custom kernels for low-rank and sparse adaptation of frozen weights."""

from . import integrations, nn
from .adapt import adapt
from .checkpoint import load_adapter, save_adapter
from .config import AdapterConfig, DoRAConfig, LoRAConfig
from .functional import dora_column_scale, dora_linear, dora_weight_norm, lora_linear
from .merge import merge_dora_, merge_lora_, unmerge_dora_
from .report import Report

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "DoRAConfig",
    "LoRAConfig",
    "Report",
    "__version__",
    "adapt",
    "dora_column_scale",
    "dora_linear",
    "dora_weight_norm",
    "integrations",
    "load_adapter",
    "lora_linear",
    "merge_dora_",
    "merge_lora_",
    "nn",
    "save_adapter",
    "unmerge_dora_",
]
