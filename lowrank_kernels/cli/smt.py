"""Sparse Matrix Tuning, as `lrk train` and `lrk demo` run it: options, selection, layers, and what is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lowrank_kernels as lk

from ..integrations.transformers import answer_loss
from . import arguments
from .method import TARGETS, Batches, Prepared

BLOCKS: arguments.OptionGroup = {
    "--block-size": {
        "type": arguments.whole(16, multiple_of=16),
        "default": 64,
        "help": "{methods}: rows and columns of a block (default 64)",
    },
    "--warmup-steps": {
        "type": arguments.count,
        "default": 20,
        "help": "{methods}: batches whose gradients choose the blocks, without updates (default %(default)s)",
    },
}
BLOCK_BUDGET: arguments.OptionGroup = {
    "--budget": {
        "type": arguments.share,
        "default": 0.0086,
        "help": "{methods}: share of all parameters that trains (default 0.0086)",
    },
}


def select_blocks(
    model: Any, batches: Iterator[Any], args: argparse.Namespace, targets: tuple[str, ...], blocks: int | None = None
) -> lk.smt.BlockSelection:
    """``blocks`` blocks of the model, or as many as ``--budget`` says."""
    was_training = model.training
    model.train()
    scores = lk.smt.warm_up(
        model,
        list(islice(batches, args.warmup_steps)),
        lambda m, batch: answer_loss(m, **batch),
        block_size=args.block_size,
        target_modules=targets,
        progress=True,
    )
    model.train(was_training)
    selection = scores.select(args.budget, of="parameters") if blocks is None else scores.select(blocks)
    print(selection, file=sys.stderr)
    return selection


def selected_blocks(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """Layers that train blocks of W (SMT); a resumed run keeps the selection."""
    if start is None:
        start = vars(select_blocks(model, batches(args.batch_size), args, TARGETS))
    return Prepared(lk.adapt(model, lk.SMTConfig(selection=lk.smt.BlockSelection(**start))), start)


def save_blocks(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write the trained blocks of W."""
    lk.smt.save_delta(model, folder)
    return f"sparse delta written to {folder}"
