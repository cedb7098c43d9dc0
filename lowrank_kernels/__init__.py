"""Custom kernels for low-rank and sparse adaptation of frozen weights."""

from . import (
    adapters,
    allocate,
    chain,
    federated,
    init,
    integrations,
    losses,
    nn,
    optim,
    prune,
    reversible,
    serving,
    side,
    smt,
    weights,
)
from .adapt import adapt, plan_adaptation
from .adapters import load_adapter, load_svft, save_adapter, save_lora_ga_adapter, save_svft
from .base_only import base_only
from .blocks import LoRAPart, mlp_lora, qkv_lora
from .config import AdapterConfig, DoRAConfig, LaMDAConfig, LoRAConfig, MultiLoRAConfig, SVFTConfig, VeLoRAConfig
from .functional import (
    BatchPlan,
    block_sparse_linear,
    block_sparse_weight_grad,
    dora_column_scale,
    dora_linear,
    dora_weight_norm,
    experts_column_scale,
    experts_linear,
    frozen_linear,
    galore_adam_,
    lora_importance,
    lora_linear,
    magnitude_histogram,
    multi_lora_linear,
    plan_batch,
    plan_experts,
    stack_column_scale,
    svft_linear,
    svft_pattern,
    velora_linear,
)
from .fuse import fuse
from .merge import merge_dora_, merge_lora_, unmerge_dora_
from .merge_checkpoint import merge_checkpoint
from .quantize import dequantize_, quantize_
from .report import Report
from .smt import SMTConfig
from .stack import LoRAStack
from .unload import merge_and_unload

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "BatchPlan",
    "DoRAConfig",
    "LaMDAConfig",
    "LoRAConfig",
    "LoRAPart",
    "LoRAStack",
    "MultiLoRAConfig",
    "Report",
    "SMTConfig",
    "SVFTConfig",
    "VeLoRAConfig",
    "__version__",
    "adapt",
    "adapters",
    "allocate",
    "base_only",
    "block_sparse_linear",
    "block_sparse_weight_grad",
    "chain",
    "dequantize_",
    "dora_column_scale",
    "dora_linear",
    "dora_weight_norm",
    "experts_column_scale",
    "experts_linear",
    "federated",
    "frozen_linear",
    "fuse",
    "galore_adam_",
    "init",
    "integrations",
    "load_adapter",
    "load_svft",
    "lora_importance",
    "lora_linear",
    "losses",
    "magnitude_histogram",
    "merge_and_unload",
    "merge_checkpoint",
    "merge_dora_",
    "merge_lora_",
    "mlp_lora",
    "multi_lora_linear",
    "nn",
    "optim",
    "plan_adaptation",
    "plan_batch",
    "plan_experts",
    "prune",
    "qkv_lora",
    "quantize_",
    "reversible",
    "save_adapter",
    "save_lora_ga_adapter",
    "save_svft",
    "serving",
    "side",
    "smt",
    "stack_column_scale",
    "svft_linear",
    "svft_pattern",
    "unmerge_dora_",
    "velora_linear",
    "weights",
]
