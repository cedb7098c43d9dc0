"""What the commands do before they adapt for Sparse Matrix Tuning: warm up, and select blocks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lowrank_kernels as lk

from ..integrations.transformers import answer_loss
from . import arguments


def add_smt_arguments(parser: argparse.ArgumentParser, warmup_steps: int) -> None:
    """The options of Sparse Matrix Tuning's warm-up."""
    parser.add_argument(
        "--block-size",
        type=arguments.whole(16, multiple_of=16),
        default=64,
        help="smt: rows and columns of a block (default 64)",
    )
    parser.add_argument(
        "--warmup-steps",
        type=arguments.count,
        default=warmup_steps,
        help=f"smt: batches whose gradients choose the blocks, without updates (default {warmup_steps})",
    )


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
