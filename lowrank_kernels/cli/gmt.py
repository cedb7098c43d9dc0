"""GMT, as `lrk train` runs it: its options, what trains, and what masks."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..optim.gmt import GMT, OVER
from . import arguments
from .batches import Batch
from .galore import train_weights_
from .method import TARGETS, Batches, Prepared

MASKS: arguments.OptionGroup = {
    "--update-share": {
        "type": arguments.share,
        "default": 0.2,
        "help": "{methods}: share of the elements that a step moves (default 0.2)",
    },
    "--mask-window": {
        "type": arguments.count,
        "default": 1,
        "help": "{methods}: steps for which a choice of elements holds (default 1)",
    },
    "--mask-over": {
        "choices": OVER,
        "default": "tensor",
        "help": "{methods}: the share of each tensor (default), or of all together",
    },
    "--histogram-threshold": {
        "action": "store_true",
        "help": "{methods}: the threshold from one histogram, and the share met nearly",
    },
}


def whole_weights(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """Let the targeted linears and the vectors train."""
    flags = {p: p.requires_grad for p in model.parameters()}
    if not train_weights_(model):
        for p, trains in flags.items():
            p.requires_grad_(trains)
        raise ValueError(f"gmt: expected linears named {', '.join(TARGETS)} with float weights, found none")
    return Prepared()


def masked(model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]) -> GMT:
    options = {"window": args.mask_window, "over": args.mask_over, "exact": not args.histogram_threshold}
    return GMT(model, optimizer, args.update_share, **options)
