"""Structures cut out of a model while its adapter trains."""

from .loraprune import LoRAPrune, cubic
from .structure import Group, Part, decoder_groups

__all__ = ["Group", "LoRAPrune", "Part", "cubic", "decoder_groups"]
