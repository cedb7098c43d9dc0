"""LaMDA, as `lrk train` runs it: its options, its layers, and what freezes B."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import lowrank_kernels as lk

from ..allocate import LaMDA, spectral_ranks
from . import arguments
from .batches import Batch
from .factors import adapter_config
from .method import Batches, Prepared

FREEZING: arguments.OptionGroup = {
    "--freeze-share": {
        "type": arguments.share,
        "default": 0.3,
        "help": "{methods}: share of the steps over which the columns of B are frozen (default 0.3)",
    },
    "--spectral-ranks": {
        "action": "store_true",
        "help": "{methods}: ranks by the spectrum of each weight (LaMDA++), --rank being their mean",
    },
}


def between_leading_vectors(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """LaMDA layers; a resumed run is given the ranks that were chosen."""
    config: Any = adapter_config(args, lk.LaMDAConfig)
    if args.spectral_ranks:
        config = lk.LaMDAConfig(**start) if start is not None else spectral_ranks(model, config)
    chosen = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout, "rslora": config.rslora}
    chosen |= {"target_modules": config.target_modules}
    chosen |= {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}
    return Prepared(lk.adapt(model, config), chosen)


def freezing(model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]) -> LaMDA:
    return LaMDA(model, optimizer, args.steps, share=args.freeze_share)
