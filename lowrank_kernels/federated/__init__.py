"""Federated low-rank tuning: what a server makes of its clients' factors, and where they start.

Strategies and a client for the engine Flower are in ``lowrank_kernels.integrations.flower``.
"""

from .factors import Factors
from .rac_lora import fed_rac_lora_
from .rules import average, fed_avg, fed_ex_lora, ffa_lora, flex_lora
from .starts import random_blocks, svd_factors

__all__ = [
    "Factors",
    "average",
    "fed_avg",
    "fed_ex_lora",
    "fed_rac_lora_",
    "ffa_lora",
    "flex_lora",
    "random_blocks",
    "svd_factors",
]
