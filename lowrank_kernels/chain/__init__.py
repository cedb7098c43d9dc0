"""Merge-and-restart schedules: a rank that is spent again and again."""

from .chain import Chain
from .cola import cola
from .rac_lora import rac_lora

__all__ = ["Chain", "cola", "rac_lora"]
