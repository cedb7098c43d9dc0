"""Adapters on disk in PEFT's format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT itself is not needed. A model is changed only after every name, shape, dtype and value has been checked.
"""

from .load import AdapterFile, load_adapter, read_adapter
from .save import save_adapter, save_lora_ga_adapter
from .svft import load_svft, save_svft

__all__ = [
    "AdapterFile",
    "load_adapter",
    "load_svft",
    "read_adapter",
    "save_adapter",
    "save_lora_ga_adapter",
    "save_svft",
]
