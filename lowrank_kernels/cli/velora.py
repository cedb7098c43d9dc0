"""VeLoRA, as `lrk train` runs it: over the factors of LoRA, or over the linears themselves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lowrank_kernels as lk

from ..init import velora_
from ..integrations.transformers import answer_loss
from . import arguments
from .factors import FACTORS, adapter_config, save_adapter
from .method import TARGETS, Batches, Prepared, save_model

PROJECTIONS: arguments.OptionGroup = {
    "--sub-tokens": {
        "type": arguments.count,
        "default": 32,
        "help": "{methods}: parts of a token of each of which one number is saved, a divisor of every K (default 32)",
    },
    "--velora-form": {
        "choices": ("lora", "dense"),
        "default": "lora",
        "help": "{methods}: what trains: LoRA's factors (default), or all of the linears, which needs --learning-rate",
    },
}


def projected(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """Layers that save projections, their vectors made of a batch without its padding; a resumed run loads them."""
    config: lk.AdapterConfig
    if args.velora_form == "dense":
        arguments.refuse_options(args.given, FACTORS, "is not an option of --velora-form dense")
        if "--learning-rate" not in args.given:
            raise ValueError(
                f"--velora-form dense: expected --learning-rate, got none; {args.learning_rate:g}, the default, is one "
                f"of factors, and too high for W: try 3e-4"
            )
        config = lk.VeLoRAConfig(velora=args.sub_tokens, target_modules=TARGETS)
    else:
        config = adapter_config(args, velora=args.sub_tokens)
    report = lk.adapt(model, config)
    velora_(model, next(batches(args.batch_size)), lambda m, batch: answer_loss(m, **batch))
    return Prepared(report)


def save_projected(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write the factors, in PEFT's format, or where W trained the model."""
    dense = any(isinstance(module, lk.nn.VeLoRALinear) for module in model.modules())
    return (save_model if dense else save_adapter)(model, tokenizer, prepared, folder)
