"""Sparse Matrix Tuning (He et al., arXiv 2405.15525): warm up, select, ``lk.adapt(model, SMTConfig(...))``, train."""

from .config import SMTConfig
from .convert import to_linear
from .delta import load_delta, save_delta
from .scores import BlockScores, warm_up
from .selection import ATTENTION, MLP, BlockSelection

__all__ = [
    "ATTENTION",
    "MLP",
    "BlockScores",
    "BlockSelection",
    "SMTConfig",
    "load_delta",
    "save_delta",
    "to_linear",
    "warm_up",
]
