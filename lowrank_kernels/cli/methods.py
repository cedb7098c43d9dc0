"""The methods of `lrk train`, by name: what a linear becomes, where it starts, who steps it, what runs alongside."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lowrank_kernels as lk

from ..chain import cola, rac_lora
from ..init import estimate_gradients, lora_ga_
from ..integrations.transformers import answer_loss
from ..optim import LoRAPro, LoRARITE, factor_groups, lora_plus
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
    """

    config: type[lk.LoRAConfig] = lk.LoRAConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any, float], torch.optim.Optimizer] = adamw
    learning_rate: float = 2e-3
    chain: Callable[..., lk.chain.Chain] | None = None
    from_gradients: bool = False

    @property
    def changes_base(self) -> bool:
        return self.chain is not None or self.from_gradients


METHODS = {
    "lora": Method(),
    "dora": Method(config=lk.DoRAConfig),
    "rac-lora": Method(settings={"train": "b", "init": "orthonormal"}, chain=rac_lora),
    "cola": Method(chain=cola),
    "lora-ga": Method(from_gradients=True, learning_rate=1e-3),
    "lora-plus": Method(optimizer=lora_plus, learning_rate=5e-4),
    "lora-pro": Method(optimizer=lambda model, lr: LoRAPro(factor_groups(model), lr=lr), learning_rate=1.0),
    "lora-rite": Method(optimizer=lambda model, lr: LoRARITE(factor_groups(model), lr=lr), learning_rate=5e-4),
}


def adapter_config(method: str, args: argparse.Namespace) -> lk.LoRAConfig:
    """What `lk.adapt` is given for a method."""
    row = METHODS[method]
    return row.config(
        r=args.rank, alpha=2 * args.rank, dropout=args.dropout, target_modules=TARGETS, rslora=args.rslora,
        **row.settings,
    )  # fmt: skip


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    chains = ", ".join(name for name, row in METHODS.items() if row.chain)
    parser.add_argument("--steps-per-link", type=int, default=25, help=f"{chains}: steps between merges (default 25)")
    parser.add_argument("--link-warmup", type=int, default=3, help=f"{chains}: warm-up steps of a link (default 3)")
    parser.add_argument("--rounding", default="nearest", help=f"{chains}: nearest (default) or stochastic (bfloat16)")
    parser.add_argument("--master", action="store_true", help=f"{chains}: keep W in float32 beside a bfloat16 one")
    parser.add_argument(
        "--gradient-batches", type=int, default=64, help="lora-ga: batches of 2 examples to start from (default 64)"
    )


def adapt(
    method: str, model: Any, args: argparse.Namespace, batches: Callable[[], Any], resumed: bool
) -> tuple[lk.Report, Any]:
    """Adapt the model; (report, LoRA-GA's starting factors or None).

    Args:
        batches: makes an iterator of batches of 2 examples.
        resumed: weights and factors are about to be loaded, so no gradient is estimated.
    """
    config, gradients = adapter_config(method, args), None
    if METHODS[method].from_gradients and not resumed:
        linears = lk.plan_adaptation(model, config).targets
        some = (batch for _, batch in zip(range(args.gradient_batches), batches(), strict=False))
        gradients = estimate_gradients(model, some, lambda m, batch: answer_loss(m, **batch), linears)
    report = lk.adapt(model, config)
    return report, None if gradients is None else lora_ga_(model, gradients, seed=args.seed)


def start_chain(
    method: str, model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> lk.chain.Chain | None:
    """The chain that rides on the optimizer, where the method has one."""
    chain = METHODS[method].chain
    if chain is None:
        return None
    return chain(
        model, optimizer, args.steps_per_link,
        seed=args.seed, warmup=args.link_warmup, rounding=args.rounding, master=args.master,
    )  # fmt: skip


def save(method: str, model: Any, tokenizer: Any, report: lk.Report, starts: Any, folder: Path) -> str:
    """Write what was trained: an adapter in PEFT's format, or after a chain, which has none, the whole model."""
    if METHODS[method].chain:
        report.undo()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return f"model written to {folder}"
    if starts is not None:
        lk.save_lora_ga_adapter(model, starts, folder, task_type="CAUSAL_LM")
    else:
        lk.save_adapter(model, folder)
    return f"adapter written to {folder}"
