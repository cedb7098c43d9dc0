"""SHERL, as `lrk train` runs it: its options, LoRA in the late layers with a side path below, and what is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lowrank_kernels as lk

from ..side import SHERLConfig, late_targets, save_sherl, sherl
from . import arguments
from .factors import adapter_config
from .method import TARGETS, Batches, Prepared

SIDE_PATH: arguments.OptionGroup = {
    "--late-layers": {
        "type": arguments.count,
        "default": 4,
        "help": "{methods}: last layers, which are adapted and back-propagated (default 4)",
    },
    "--side-width": {
        "type": arguments.count,
        "default": 64,
        "help": "{methods}: width of the side features (default 64)",
    },
}


def side_path(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """LoRA in the late layers, and a side path below them. A model that it refuses is put back."""
    config = SHERLConfig(late_layers=args.late_layers, width=args.side_width)
    adapted = lk.adapt(model, adapter_config(args, target_modules=late_targets(model, config, TARGETS)))
    try:
        sherl(model, config)
    except BaseException:
        adapted.undo()
        raise
    return Prepared(adapted)


def save_side_path(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write the side path and the LoRA factors, to be loaded over the same base."""
    save_sherl(model, folder)
    return f"SHERL's side path and LoRA factors written to {folder}"
