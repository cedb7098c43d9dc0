"""Merge-and-restart schedules: a rank that is spent again and again."""

from .chain import Chain
from .cola import cola
from .rac_lora import rac_lora
from .xgblora import XGBLoRA, xgblora

__all__ = ["Chain", "XGBLoRA", "cola", "rac_lora", "xgblora"]
