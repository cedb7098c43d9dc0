"""Other packages' models on this package's ops. Each is imported when first named, and needs its package then."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["flower", "peft", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
