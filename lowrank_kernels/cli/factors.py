"""Methods that train low-rank factors, as `lrk train` runs them: options, layers, chains, and what is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import lowrank_kernels as lk

from ..init import estimate_gradients, lora_ga_
from ..integrations.transformers import answer_loss
from ..merge import ROUNDINGS
from . import arguments
from .batches import Batch
from .method import TARGETS, Batches, Prepare, Prepared, Ride

FACTORS: arguments.OptionGroup = {
    "--rank": {
        "type": arguments.count,
        "default": 8,
        "help": "rank R of the correction (default 8, or the method's own; alpha is 2 R)",
    },
    "--dropout": {
        "type": arguments.number(0.0, below=1.0),
        "default": 0.0,
        "help": "dropout on the correction's input (default 0)",
    },
    "--rslora": {"action": "store_true", "help": "scale by alpha / sqrt(R) instead of alpha / R"},
}
LINKS: arguments.OptionGroup = {
    "--steps-per-link": {
        "type": arguments.count,
        "default": 25,
        "help": "{methods}: steps between merges (default 25, or the method's own)",
    },
    "--link-warmup": {
        "type": arguments.whole(0),
        "default": 3,
        "help": "{methods}: warm-up steps of a link (default 3)",
    },
    "--link-ranks": {
        "type": arguments.count,
        "nargs": "+",
        "metavar": "R",
        "help": "{methods}: ranks of the links, the last one's also of all that follow (default: --rank for all)",
    },
    "--rounding": {
        "choices": ROUNDINGS,
        "default": "nearest",
        "help": "{methods}: nearest (default) or stochastic (bfloat16)",
    },
    "--master": {"action": "store_true", "help": "{methods}: keep W in float32 beside a bfloat16 one"},
}
BOOSTING: arguments.OptionGroup = {
    "--layer-share": {
        "type": arguments.share,
        "default": 0.3,
        "help": "{methods}: share of the layers that train in a link (default 0.3)",
    },
    "--factor-l2": {
        "type": arguments.number(),
        "default": 1e-4,
        "help": "{methods}: weight of (‖A‖² + ‖B‖²) / 2 in the loss (default 1e-4)",
    },
    "--max-links": {
        "type": arguments.count,
        "help": "{methods}: links after which nothing trains further (default: as many as the steps allow)",
    },
}
GRADIENTS: arguments.OptionGroup = {
    "--gradient-batches": {
        "type": arguments.count,
        "default": 64,
        "help": "{methods}: batches of 2 examples to start from (default 64)",
    },
}


def adapter_config(
    args: argparse.Namespace, kind: type[lk.LoRAConfig] = lk.LoRAConfig, **settings: Any
) -> lk.LoRAConfig:
    """The config of the layers that the options of ``FACTORS`` ask for."""
    own = {"r": args.rank, "alpha": 2 * args.rank, "dropout": args.dropout, "rslora": args.rslora}
    return kind(**{**own, "target_modules": TARGETS, **settings})


def layers(kind: type[lk.LoRAConfig] = lk.LoRAConfig, **settings: Any) -> Prepare:
    """The `prepare` that replaces the targeted linears by layers of a config, and does nothing else."""

    def prepare(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
        return Prepared(lk.adapt(model, adapter_config(args, kind, **settings)))

    return prepare


def from_gradients(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """LoRA layers that start from gradients (LoRA-GA); a resumed run has the start in the weights that it loads."""
    config = adapter_config(args)
    if start is not None:
        return Prepared(lk.adapt(model, config), start)
    linears = lk.plan_adaptation(model, config).targets
    some = islice(batches(2), args.gradient_batches)
    gradients = estimate_gradients(model, some, lambda m, batch: answer_loss(m, **batch), linears)
    return Prepared(lk.adapt(model, config), lora_ga_(model, gradients, seed=args.seed))


def chained(chain: Callable[..., lk.chain.Chain], **own: str) -> Ride:
    """The `ride` that merges and restarts as the options of ``LINKS`` ask for, and its ``own``: settings by option."""

    def ride(
        model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]
    ) -> lk.chain.Chain:
        return chain(
            model,
            optimizer,
            args.steps_per_link,
            seed=args.seed,
            warmup=args.link_warmup,
            ranks=args.link_ranks,
            rounding=args.rounding,
            master=args.master,
            **{setting: getattr(args, option) for setting, option in own.items()},
        )

    return ride


def save_adapter(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write the factors, in PEFT's format."""
    lk.save_adapter(model, folder)
    return f"adapter written to {folder}"


def save_from_start(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write the change since LoRA-GA's start, as factors of twice the rank in PEFT's format."""
    lk.save_lora_ga_adapter(model, prepared.start, folder, task_type="CAUSAL_LM")
    return f"adapter written to {folder}"
