"""`lrk train`: fine-tune a language model on the docstring task with one method, and report it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import methods
from .methods import METHODS
from .smt import add_smt_arguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_training_arguments(parser: argparse.ArgumentParser, steps: int, warmup_steps: int) -> None:
    """The options that `train` and `demo` share."""
    parser.add_argument("--model", default="smollm2", help="'smollm2', or a folder that transformers wrote")
    parser.add_argument("--rank", type=int, default=8, help="rank R of the correction (default 8; alpha is 2 R)")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout on the correction's input (default 0)")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(R) instead of alpha / R")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps (default {steps})")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step (default 16)")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate (default: the method's own)")
    add_smt_arguments(parser, warmup_steps)
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
    add_training_arguments(parser, steps=100, warmup_steps=20)
    methods.add_method_arguments(parser)
    parser.add_argument(
        "--output", type=Path, help="folder for the trained adapter in PEFT's format, SMT's sparse delta, or the model"
    )
    parser.add_argument("--json", type=Path, help="write losses, times and settings to this file")
    parser.add_argument("--checkpoint", type=Path, help="file to save the run to, and to go on from where it exists")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default 50)")
    parser.add_argument("--stop-after", type=int, help="stop after so many steps; the same command goes on later")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import training as loop

    method = METHODS[args.method]
    if args.learning_rate is None:
        args.learning_rate = method.learning_rate
    checkpoint = loop.read_checkpoint(args)
    model, tokenizer, examples, held_out = load_task(args)
    torch.manual_seed(args.seed)
    report, start = methods.adapt(
        args.method, model, args, lambda size: loop.batches(tokenizer, examples, size, args.seed + 1, args.device),
        checkpoint and checkpoint["start"],
    )  # fmt: skip
    print(f"{len(report.replaced)} modules adapted, {len(report.skipped)} skipped", file=sys.stderr)
    training = loop.Run(args.method, model, args.learning_rate, args.steps, method.optimizer)
    chain = methods.start_chain(args.method, model, training.optimizer, args)
    stream = loop.batches(tokenizer, examples, args.batch_size, args.seed, args.device)
    if checkpoint is None:
        before = loop.held_out_loss(model, tokenizer, held_out, args.batch_size, args.device)
    else:
        before = checkpoint["held_out_before"]
        training.load(checkpoint["run"])
        for _ in training.losses:
            next(stream)
        print(f"going on at step {len(training.losses)} of {args.steps}", file=sys.stderr)
    last = min(args.steps, args.stop_after or args.steps)
    with tqdm(total=args.steps, initial=len(training.losses), desc=args.method, unit="step") as bar:
        while len(training.losses) < last:
            batch = next(stream)
            loss = training.step(batch)
            rate = batch["attention_mask"].sum().item() / training.seconds[-1]
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} tokens/s")
            bar.update()
            step = len(training.losses)
            if args.checkpoint and (step % args.save_every == 0 or step == last):
                loop.write_checkpoint(
                    args,
                    {"held_out_before": before, "start": start, "run": training.state(base=method.changes_base)},
                )
    if last < args.steps:
        print(f"stopped after step {last} of {args.steps}")
        return 0
    after = loop.held_out_loss(model, tokenizer, held_out, args.batch_size, args.device)
    result = {
        "method": args.method, "model": args.model, "rank": args.rank, "steps": args.steps, "seed": args.seed,
        "learning_rate": args.learning_rate, "links": chain.link if chain else 0,
        "trainable_parameters": training.trainable, "held_out_before": before, "held_out_after": after,
        "seconds_per_step": training.median_seconds(), "losses": training.losses, "environment": loop.environment(),
    }  # fmt: skip
    print(
        f"held-out loss {before:.4f} -> {after:.4f} nats a token; {training.trainable} trainable parameters; "
        f"{training.median_seconds():.2f} s a step (median)"
    )
    if args.output:
        if chain:
            chain.merge()
        print(methods.save(args.method, model, tokenizer, report, start, args.output))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
    return 0
