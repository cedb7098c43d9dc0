"""`lrk train`: fine-tune a language model on the docstring task with one method, and report it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from ..chain import Chain
from ..quantize import quantize_
from ..weights import encoders
from . import arguments, methods
from .allocation import VALIDATION
from .factors import FACTORS
from .methods import METHODS
from .smt import BLOCKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARED = (FACTORS, BLOCKS)
"""The groups of options of methods that `train` and `demo` share."""


def add_training_arguments(parser: argparse.ArgumentParser, steps: int, warmup_steps: int) -> None:
    """The options that `train` and `demo` share."""
    parser.add_argument("--model", default="smollm2", help="'smollm2', or a folder that transformers wrote")
    parser.add_argument("--steps", type=arguments.count, default=steps, help=f"optimizer steps (default {steps})")
    parser.add_argument("--batch-size", type=arguments.count, default=16, help="examples a step (default 16)")
    parser.add_argument(
        "--learning-rate", type=arguments.number(above=0.0), help="peak learning rate (default: the method's own)"
    )
    parser.add_argument(
        "--held-out", type=arguments.count, default=128, help="held-out functions to evaluate on (default 128)"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of initialisation and order (default 0)")
    parser.add_argument("--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base model (default float32 on CPU, bfloat16 on GPU)")
    methods.add_options(parser, *SHARED)
    parser.set_defaults(warmup_steps=warmup_steps)


def load_task(args: argparse.Namespace) -> tuple[Any, Any, list[Any], list[Any]]:
    """(model, tokenizer, training examples, held-out examples) as the options say."""
    from ..integrations.transformers import load_language_model
    from . import docstrings

    dtype = DTYPES[args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")]
    print(f"loading {args.model} as {dtype} on {args.device}", file=sys.stderr)
    model, tokenizer = load_language_model(args.model, dtype, args.device)
    training, held_out = docstrings.split(docstrings.collect())
    if len(training) < args.batch_size:
        raise ValueError(f"--batch-size: {args.batch_size} is more than the {len(training)} training functions")
    print(f"{len(training)} functions to train on, {len(held_out)} held out", file=sys.stderr)
    # Every n-th, so that all libraries are in the sample.
    return model, tokenizer, training, held_out[:: max(1, len(held_out) // args.held_out)][: args.held_out]


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        choices=encoders(),
        help="store the base model's linears in few bits first, as QLoRA does (default: dense)",
    )


def store_base(model: Any, format_: str | None) -> None:
    """The base model as --base says."""
    if format_ is not None:
        report = quantize_(model, format_)
        print(f"{len(report.replaced)} linears stored as {format_}, {len(report.skipped)} left", file=sys.stderr)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("train", help=__doc__, description=__doc__)
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="lora",
        help="; ".join(f"{name}: {row.summary}" for name, row in METHODS.items()) + " (default lora)",
    )
    add_training_arguments(parser, steps=100, warmup_steps=20)
    add_base_argument(parser)
    methods.add_method_arguments(parser, beside=SHARED)
    parser.add_argument(
        "--output",
        type=arguments.output_folder,
        help="folder for the trained adapter in PEFT's format, SMT's sparse delta, SVFT's M, or the model",
    )
    parser.add_argument(
        "--json",
        type=arguments.output_file,
        help="write losses, times and settings to this file, and what the method decided over time to a .png beside it",
    )
    parser.add_argument(
        "--checkpoint", type=arguments.state_file, help="file to save the run to, and to go on from where it exists"
    )
    parser.add_argument("--save-every", type=arguments.count, default=50, help="steps between checkpoints (default 50)")
    parser.add_argument(
        "--stop-after", type=arguments.count, help="stop after so many steps; the same command goes on later"
    )


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    arguments.refuse_options(
        args.given, methods.ignored_options(args.method), f"is not an option of --method {args.method}"
    )
    if args.base and not methods.leaves_base(args.method):
        raise ValueError(f"--base: --method {args.method} changes the base model's weights, which stay as dense ones")
    if args.checkpoint is None:
        arguments.refuse_options(
            args.given, ("--save-every", "--stop-after"), "needs --checkpoint, where the run is kept"
        )
    arguments.refuse_one_place(args, "--output", "--json", "--checkpoint")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .batches import batches, in_order
    from .checkpoint import read_checkpoint, write_checkpoint
    from .decided import draw_beside
    from .environment import environment
    from .evaluation import held_out_loss
    from .loop import Run

    _check(args)
    method = METHODS[args.method]
    if args.learning_rate is None:
        args.learning_rate = method.learning_rate
    for name, value in method.defaults.items():
        if f"--{name.replace('_', '-')}" not in args.given:
            setattr(args, name, value)
    checkpoint = read_checkpoint(args)
    model, tokenizer, examples, held_out = load_task(args)
    aside = args.validation_examples if VALIDATION in method.options else 0
    if aside > len(examples) - args.batch_size:
        raise ValueError(f"--validation-examples: {aside} leaves too few of {len(examples)} training functions")
    validation = list(in_order(tokenizer, examples[:aside], args.batch_size, args.device))
    examples = examples[aside:]
    store_base(model, args.base)
    torch.manual_seed(args.seed)
    prepared = method.prepare(
        model,
        args,
        lambda size: batches(tokenizer, examples, size, args.seed + 1, args.device),
        checkpoint and checkpoint["start"],
    )
    if prepared.report is not None:
        replaced, skipped = prepared.report.replaced, prepared.report.skipped
        print(f"{len(replaced)} modules adapted, {len(skipped)} skipped", file=sys.stderr)
    training = Run(
        args.method, model, args.learning_rate, args.steps, lambda model, lr: method.optimizer(model, lr, args)
    )
    rider = training.rider = method.ride(model, training.optimizer, args, validation) if method.ride else None
    chain = rider if isinstance(rider, Chain) else None
    stream = batches(tokenizer, examples, args.batch_size, args.seed, args.device)
    if checkpoint is None:
        before = held_out_loss(model, tokenizer, held_out, args.batch_size, args.device)
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
                state = training.state(base=method.changes_base)
                write_checkpoint(args, {"held_out_before": before, "start": prepared.start, "run": state})
    if last < args.steps:
        print(f"stopped after step {len(training.losses)} of {args.steps}")
        return 0
    after = held_out_loss(model, tokenizer, held_out, args.batch_size, args.device)
    result = {
        "method": args.method,
        "model": args.model,
        "base": args.base or "dense",
        "rank": args.rank,
        "steps": args.steps,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "links": chain.link if chain else 0,
        "trainable_parameters": training.trainable,
        "held_out_before": before,
        "held_out_after": after,
        "seconds_per_step": training.median_seconds(),
        "losses": training.losses,
        "history": rider.history if rider else None,
        "environment": environment(),
    }
    print(
        f"held-out loss {before:.4f} -> {after:.4f} nats a token; {training.trainable} trainable parameters; "
        f"{training.median_seconds():.2f} s a step (median)"
    )
    if args.output:
        if rider:
            rider.finish()
        print(method.save(model, tokenizer, prepared, args.output))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))
        if result["history"] and (picture := draw_beside(args.json, result["history"], args.method)):
            print(f"picture written to {picture}")
    return 0
