"""The engine: many generations over one model, each with its own adapter, joining and leaving at every token."""

from .constraints import Constraint
from .engine import Engine
from .generation import Closed, Completion, Delta, Generation, QueueFull, Times, TokenLogprob

__all__ = [
    "Closed",
    "Completion",
    "Constraint",
    "Delta",
    "Engine",
    "Generation",
    "QueueFull",
    "Times",
    "TokenLogprob",
]
