"""MEFT, as `lrk train` runs it: its options, LoRA with the layers made reversible, and what is written."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import lowrank_kernels as lk

from ..reversible import MEFTConfig, meft, save_meft
from . import arguments
from .factors import adapter_config
from .method import Batches, Prepared


def scale(text: str) -> float:
    """A finite number other than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value == 0 or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number other than 0, got {text!r:.300}")
    return value


REVERSIBLE: arguments.OptionGroup = {
    "--meft": {
        "type": int,
        "choices": (1, 2, 3),
        "default": 1,
        "help": "{methods}: F and G are 1: layer and adapter, 2: adapter and layer, 3: attention and MLP (default 1)",
    },
    "--meft-lambda": {"type": scale, "help": "{methods}: λ (default 0.1; of 2, 1; of 3, -0.1)"},
    "--meft-beta": {"type": scale, "help": "{methods}: β (default 0.1)"},
    "--keep-every": {
        "type": arguments.count,
        "default": 2,
        "help": "{methods}: inputs of every so many layers are kept, the others computed back (default 2)",
    },
    "--adapter-size": {
        "type": arguments.count,
        "default": 16,
        "help": "{methods}: width of the adapters of --meft 1 and 2 (default 16)",
    },
}


def reversible(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """LoRA layers, in a stack that is made reversible. A model that it refuses is put back."""
    if args.meft == 3:
        arguments.refuse_options(args.given, ("--adapter-size",), "is not an option of --meft 3, which has no adapters")
    config = MEFTConfig(
        variant=args.meft,
        lam=args.meft_lambda,
        beta=args.meft_beta,
        adapter_size=args.adapter_size,
        keep_every=args.keep_every,
    )
    adapted = lk.adapt(model, adapter_config(args))
    try:
        meft(model, config)
    except BaseException:
        adapted.undo()
        raise
    return Prepared(adapted)


def save_reversible(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write MEFT's adapters and the LoRA factors, to be loaded over the same base."""
    save_meft(model, folder)
    return f"MEFT's adapters and LoRA factors written to {folder}"
