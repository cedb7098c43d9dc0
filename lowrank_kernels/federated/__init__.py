"""Aggregation rules."""

from .rac_lora import fed_rac_lora_

__all__ = ["fed_rac_lora_"]
