"""Adapters on disk: PEFT's folders, put on models and written from them, and files of other engines.

A PEFT folder has ``adapter_config.json`` and ``adapter_model.safetensors``; PEFT itself is not needed. A model is
changed only after every name, shape, dtype and value has been checked.
"""

from .adapter import Adapter, Factors
from .arithmetic import Approximation, dare, extract, reduce_rank, ties, weighted_sum
from .convert import convert, format_of, read
from .inspection import Inspection, differences, inspect_adapter
from .load import AdapterFile, load_adapter, read_adapter
from .save import save_adapter, save_lora_ga_adapter
from .svft import load_svft, save_svft

__all__ = [
    "Adapter",
    "AdapterFile",
    "Approximation",
    "Factors",
    "Inspection",
    "convert",
    "dare",
    "differences",
    "extract",
    "format_of",
    "inspect_adapter",
    "load_adapter",
    "load_svft",
    "read",
    "read_adapter",
    "reduce_rank",
    "save_adapter",
    "save_lora_ga_adapter",
    "save_svft",
    "ties",
    "weighted_sum",
]
