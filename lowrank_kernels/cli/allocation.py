"""Methods that decide where ranks, modules or heads go, as `lrk train` runs them: options, and what rides."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import lowrank_kernels as lk

from ..allocate import ALoRA, HeteroLoRA, SoRA, add_shortcuts_, rising, sora_groups
from ..allocate.hetero_lora import PROXIES
from ..integrations.transformers import answer_loss
from ..prune import LoRAPrune
from . import arguments
from .batches import Batch
from .factors import adapter_config
from .method import TARGETS, Batches, Prepared

GATES: arguments.OptionGroup = {
    "--gate-penalty": {
        "type": arguments.number(),
        "default": 5e-4,
        "help": "{methods}: λ; a gate is zero where the loss gains less by it (default 5e-4)",
    },
    "--gate-penalty-steps": {
        "type": arguments.whole(0),
        "default": 0,
        "help": "{methods}: steps over which λ rises from 0 (default 0)",
    },
    "--gate-learning-rate": {
        "type": arguments.number(above=0.0),
        "default": 100.0,
        "help": "{methods}: peak learning rate of the gates' proximal step (default 100)",
    },
}
VALIDATION: arguments.OptionGroup = {
    "--validation-examples": {
        "type": arguments.count,
        "default": 16,
        "help": "{methods}: training examples set aside to score by (default 16)",
    },
}
MOVES: arguments.OptionGroup = {
    "--steps-per-round": {
        "type": arguments.count,
        "default": 40,
        "help": "{methods}: steps between reallocations (default 40)",
    },
    "--rounds": {"type": arguments.count, "default": 2, "help": "{methods}: reallocations (default 2)"},
    "--moved-share": {
        "type": arguments.share,
        "default": 0.1,
        "help": "{methods}: share of all ranks that moves at each (default 0.1)",
    },
}
MODULES: arguments.OptionGroup = {
    "--adapter-budget": {
        "type": arguments.share,
        "default": 0.5,
        "help": "{methods}: share of the factors' parameters that trains after the choice (default 0.5)",
    },
    "--proxy": {"choices": PROXIES, "default": "grad_norm", "help": "{methods}: score of a module (default grad_norm)"},
    "--score-after": {
        "type": arguments.count,
        "default": 10,
        "help": "{methods}: steps before the first choice (default 10)",
    },
    "--choose-every": {
        "type": arguments.count,
        "help": "{methods}: steps from one choice to the next (default: one choice)",
    },
    "--shortcuts": {
        "action": "store_true",
        "help": "{methods}: linear shortcuts around attention and MLP, adapted too",
    },
}
PRUNING: arguments.OptionGroup = {
    "--prune-ratio": {
        "type": arguments.number(above=0.0, below=1.0),
        "default": 0.2,
        "help": "{methods}: share of the parameters in attention and MLP to cut (default 0.2)",
    },
    "--prune-warmup": {
        "type": arguments.whole(0),
        "default": 10,
        "help": "{methods}: steps before the first mask (default 10)",
    },
    "--prune-steps": {
        "type": arguments.count,
        "help": "{methods}: step at which all is masked (default: three quarters of --steps)",
    },
}


def gated(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """LoRA layers with gates."""
    return Prepared(lk.adapt(model, adapter_config(args, gate=True)))


def gated_with_shortcuts(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """LoRA layers with gates, over shortcuts too where asked."""
    shortcuts: tuple[str, ...] = ()
    if args.shortcuts:
        add_shortcuts_(model)
        shortcuts = ("shortcut",)
    return Prepared(lk.adapt(model, adapter_config(args, gate=True, target_modules=(*TARGETS, *shortcuts))))


def gate_optimizer(model: Any, learning_rate: float, args: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(sora_groups(model, learning_rate, args.gate_learning_rate))


def sora(model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]) -> SoRA:
    steps = args.gate_penalty_steps
    return SoRA(model, optimizer, rising(0.0, args.gate_penalty, steps) if steps else args.gate_penalty)


def alora(model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]) -> ALoRA:
    ranks = sum(layer.r for layer in model.modules() if isinstance(layer, lk.nn.LoRALinear))
    return ALoRA(
        model,
        optimizer,
        validation,
        _loss,
        every=args.steps_per_round,
        moves=max(1, round(args.moved_share * ranks)),
        rounds=args.rounds,
        seed=args.seed,
        progress=True,
    )


def hetero_lora(
    model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]
) -> HeteroLoRA:
    return HeteroLoRA(
        model,
        optimizer,
        validation,
        _loss,
        budget=float(args.adapter_budget),
        proxy=args.proxy,
        warmup=args.score_after,
        every=args.choose_every,
    )


def lora_prune(
    model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]
) -> LoRAPrune:
    steps = args.prune_steps or max(args.prune_warmup + 1, 3 * args.steps // 4)
    return LoRAPrune(model, optimizer, ratio=args.prune_ratio, steps=steps, warmup=args.prune_warmup)


def save_cut(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write the model, cut and merged."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model written to {folder}"


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = answer_loss(model, **batch)
    return loss
