"""Reversible layers: activations that backward computes back from outputs."""

from .folder import load_meft, save_meft
from .meft import MEFTAdapter, MEFTConfig, meft
from .stack import ReversibleStack

__all__ = ["MEFTAdapter", "MEFTConfig", "ReversibleStack", "load_meft", "meft", "save_meft"]
