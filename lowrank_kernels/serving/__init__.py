"""Serving: one frozen model, many adapters, each sequence of a batch with its own."""

from .bank import AdapterBank
from .engine import Engine, Generation

__all__ = ["AdapterBank", "Engine", "Generation"]
