"""The methods of `lrk train`, by name: what a linear becomes, where it starts, who steps it, what runs alongside."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import lowrank_kernels as lk

from ..chain import cola, rac_lora
from ..init import estimate_gradients, lora_ga_
from ..integrations.transformers import answer_loss
from ..merge import ROUNDINGS
from ..optim import BlockAdamW, LoRAPro, LoRARITE, factor_groups, lora_plus
from . import arguments
from .smt import select_blocks
from .training import adamw

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        config, settings: of the layers.
        optimizer: (model, learning rate) -> optimizer.
        learning_rate: the default.
        chain: merges and restarts, riding on the optimizer; None for none.
        from_gradients: starts from gradients (LoRA-GA).
        blocks: trains blocks of W, and no factors (SMT).
    """

    config: type[lk.LoRAConfig] = lk.LoRAConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any, float], torch.optim.Optimizer] = adamw
    learning_rate: float = 2e-3
    chain: Callable[..., lk.chain.Chain] | None = None
    from_gradients: bool = False
    blocks: bool = False

    @property
    def changes_base(self) -> bool:
        return self.chain is not None or self.from_gradients


METHODS = {
    "lora": Method(),
    "dora": Method(config=lk.DoRAConfig),
    "rac-lora": Method(settings={"train": "b", "init": "orthonormal"}, chain=rac_lora),
    "cola": Method(chain=cola),
    "lora-ga": Method(from_gradients=True, learning_rate=2.5e-4),
    "lora-plus": Method(optimizer=lora_plus, learning_rate=5e-4),
    "lora-pro": Method(optimizer=lambda model, lr: LoRAPro(factor_groups(model), lr=lr), learning_rate=3.90625e-5),
    "lora-rite": Method(optimizer=lambda model, lr: LoRARITE(factor_groups(model), lr=lr), learning_rate=1.25e-4),
    "smt": Method(optimizer=lambda model, lr: BlockAdamW(model, lr=lr), learning_rate=3e-4, blocks=True),
}


def adapter_config(method: str, args: argparse.Namespace) -> lk.LoRAConfig:
    """What `lk.adapt` is given for a method."""
    row = METHODS[method]
    return row.config(
        r=args.rank,
        alpha=2 * args.rank,
        dropout=args.dropout,
        target_modules=TARGETS,
        rslora=args.rslora,
        **row.settings,
    )


def ignored_options(method: str) -> list[str]:
    """The options of other methods."""
    row = METHODS[method]
    groups = (
        (("--rank", "--dropout", "--rslora"), not row.blocks),
        (("--steps-per-link", "--link-warmup", "--link-ranks", "--rounding", "--master"), row.chain is not None),
        (("--gradient-batches",), row.from_gradients),
        (("--budget", "--block-size", "--warmup-steps"), row.blocks),
    )
    return [option for options, taken in groups if not taken for option in options]


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        type=arguments.share,
        default=0.0086,
        help="smt: share of all parameters that trains (default 0.0086)",
    )
    chains = ", ".join(name for name, row in METHODS.items() if row.chain)
    parser.add_argument(
        "--steps-per-link", type=arguments.count, default=25, help=f"{chains}: steps between merges (default 25)"
    )
    parser.add_argument(
        "--link-warmup", type=arguments.whole(0), default=3, help=f"{chains}: warm-up steps of a link (default 3)"
    )
    parser.add_argument(
        "--link-ranks",
        type=arguments.count,
        nargs="+",
        metavar="R",
        help=f"{chains}: ranks of the links, the last one's also of all that follow (default: --rank for all)",
    )
    parser.add_argument(
        "--rounding", choices=ROUNDINGS, default="nearest", help=f"{chains}: nearest (default) or stochastic (bfloat16)"
    )
    parser.add_argument("--master", action="store_true", help=f"{chains}: keep W in float32 beside a bfloat16 one")
    parser.add_argument(
        "--gradient-batches",
        type=arguments.count,
        default=64,
        help="lora-ga: batches of 2 examples to start from (default 64)",
    )


def adapt(
    method: str, model: Any, args: argparse.Namespace, batches: Callable[[int], Any], start: Any
) -> tuple[lk.Report, Any]:
    """Adapt the model; (report, what a resumed run starts from: LoRA-GA's factors, SMT's selection, or None).

    Args:
        batches: makes an iterator of batches of so many examples.
        start: of the run that is resumed, whose weights are about to be loaded; None for a new run.
    """
    row = METHODS[method]
    if row.blocks:
        if start is None:
            start = vars(select_blocks(model, batches(args.batch_size), args, TARGETS))
        return lk.adapt(model, lk.SMTConfig(selection=lk.smt.BlockSelection(**start))), start
    config = adapter_config(method, args)
    if not row.from_gradients or start is not None:
        return lk.adapt(model, config), start
    linears = lk.plan_adaptation(model, config).targets
    some = islice(batches(2), args.gradient_batches)
    gradients = estimate_gradients(model, some, lambda m, batch: answer_loss(m, **batch), linears)
    return lk.adapt(model, config), lora_ga_(model, gradients, seed=args.seed)


def start_chain(
    method: str, model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> lk.chain.Chain | None:
    """The chain that rides on the optimizer, where the method has one."""
    chain = METHODS[method].chain
    if chain is None:
        return None
    return chain(
        model,
        optimizer,
        args.steps_per_link,
        seed=args.seed,
        warmup=args.link_warmup,
        ranks=args.link_ranks,
        rounding=args.rounding,
        master=args.master,
    )


def save(method: str, model: Any, tokenizer: Any, report: lk.Report, start: Any, folder: Path) -> str:
    """Write what was trained: an adapter in PEFT's format, SMT's blocks, or after a chain, which has none, all."""
    if METHODS[method].chain:
        report.undo()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return f"model written to {folder}"
    if METHODS[method].blocks:
        lk.smt.save_delta(model, folder)
        return f"sparse delta written to {folder}"
    if start is not None:
        lk.save_lora_ga_adapter(model, start, folder, task_type="CAUSAL_LM")
    else:
        lk.save_adapter(model, folder)
    return f"adapter written to {folder}"
