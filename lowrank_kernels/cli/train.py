"""`lrk train`: fine-tune a language model on the docstring task with one method, and report it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def adapter_config(method: str, args: argparse.Namespace) -> Any:
    """What `lk.adapt` is given for a method."""
    import lowrank_kernels as lk

    config = {"lora": lk.LoRAConfig, "dora": lk.DoRAConfig}[method]
    return config(r=args.rank, alpha=2 * args.rank, dropout=args.dropout, target_modules=TARGETS, rslora=args.rslora)


METHODS = ("lora", "dora")


def add_training_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """The options that `train` and `demo` share."""
    parser.add_argument("--model", default="smollm2", help="'smollm2', or a folder that transformers wrote")
    parser.add_argument("--rank", type=int, default=8, help="rank R of the correction (default 8; alpha is 2 R)")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout on the correction's input (default 0)")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(R) instead of alpha / R")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps (default {steps})")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step (default 16)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--held-out", type=int, default=128, help="held-out functions to evaluate on (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and order (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base model (default float32 on CPU, bfloat16 on GPU)")


def load_task(args: argparse.Namespace) -> tuple[Any, Any, list[Any], list[Any]]:
    """(model, tokenizer, training examples, held-out examples) as the options say."""
    from ..integrations.transformers import load_language_model
    from . import docstrings

    for name in ("rank", "steps", "batch_size", "held_out"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    print(f"loading {args.model} as {dtype} on {device}", file=sys.stderr)
    model, tokenizer = load_language_model(args.model, dtype, device)
    training, held_out = docstrings.split(docstrings.collect())
    if len(training) < args.batch_size:
        raise ValueError(f"--batch-size: {args.batch_size} is more than the {len(training)} training functions")
    print(f"{len(training)} functions to train on, {len(held_out)} held out", file=sys.stderr)
    # Every n-th, so that all libraries are in the sample.
    return model, tokenizer, training, held_out[:: max(1, len(held_out) // args.held_out)][: args.held_out]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("train", help=__doc__, description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="lora")
    add_training_arguments(parser, steps=100)
    parser.add_argument("--output", type=Path, help="folder for the trained adapter, in PEFT's format")
    parser.add_argument("--json", type=Path, help="write losses, times and settings to this file")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    import lowrank_kernels as lk

    from . import training as loop

    model, tokenizer, examples, held_out = load_task(args)
    torch.manual_seed(args.seed)
    report = lk.adapt(model, adapter_config(args.method, args))
    print(f"{len(report.replaced)} modules adapted, {len(report.skipped)} skipped", file=sys.stderr)
    before = loop.held_out_loss(model, tokenizer, held_out, args.batch_size, args.device)
    training = loop.Run(args.method, model, args.learning_rate, args.steps)
    stream = loop.batches(tokenizer, examples, args.batch_size, args.seed, args.device)
    with tqdm(total=args.steps, desc=args.method, unit="step") as bar:
        for _ in range(args.steps):
            batch = next(stream)
            loss = training.step(batch)
            rate = batch["attention_mask"].sum().item() / training.seconds[-1]
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} tokens/s")
            bar.update()
    after = loop.held_out_loss(model, tokenizer, held_out, args.batch_size, args.device)
    result = {
        "method": args.method, "model": args.model, "rank": args.rank, "steps": args.steps, "seed": args.seed,
        "trainable_parameters": training.trainable, "held_out_before": before, "held_out_after": after,
        "seconds_per_step": training.median_seconds(), "losses": training.losses, "environment": loop.environment(),
    }  # fmt: skip
    print(
        f"held-out loss {before:.4f} -> {after:.4f} nats a token; {training.trainable} trainable parameters; "
        f"{training.median_seconds():.2f} s a step (median)"
    )
    if args.output:
        lk.save_adapter(model, args.output)
        print(f"adapter written to {args.output}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
    return 0
