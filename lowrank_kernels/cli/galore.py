"""GaLore, as `lrk train` runs it: its options, what trains, and its optimizer."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..optim import GaLore, galore_groups
from ..optim.galore import MOMENTS
from . import arguments
from .method import TARGETS, Batches, Prepared

PROJECTION: arguments.OptionGroup = {
    "--projection-rank": {
        "type": arguments.count,
        "default": 64,
        "help": "{methods}: directions R that each gradient is projected to (default 64)",
    },
    "--projection-steps": {
        "type": arguments.count,
        "default": 200,
        "help": "{methods}: steps between new directions (default 200)",
    },
    "--projection-scale": {
        "type": arguments.number(above=0.0),
        "default": 0.25,
        "help": "{methods}: α, what the projected step is multiplied by (default 0.25)",
    },
    "--projection-moments": {
        "choices": MOMENTS,
        "default": "rotate",
        "help": "{methods}: what becomes of Adam's moments at new directions (default rotate)",
    },
}


def all_weights(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """As :func:`train_weights_`; where the rank fits no weight, the model is as before.

    Raises:
        ValueError: no such linear, one whose weight is no dense float matrix, or one smaller than the rank.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        train_weights_(model)
        _groups(model, args)
    except Exception:
        for p, trains in flags.items():
            p.requires_grad_(trains)
        raise
    return Prepared()


def train_weights_(model: Any) -> int:
    """Let the targeted linears and the vectors (norms, biases) train, and freeze the rest: embeddings and head.

    Returns:
        How many matrices train.
    """
    kept = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    matrices = 0
    for name, p in model.named_parameters():
        linear = name.removesuffix(".weight").rpartition(".")[2] in TARGETS
        p.requires_grad_(p.is_floating_point() and id(p) not in kept and (linear or p.dim() == 1))
        matrices += p.requires_grad and linear
    return matrices


def _groups(model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    return galore_groups(
        model,
        TARGETS,
        args.projection_rank,
        update_proj_gap=args.projection_steps,
        scale=args.projection_scale,
        moments=args.projection_moments,
    )


def galore(model: Any, learning_rate: float, args: argparse.Namespace) -> torch.optim.Optimizer:
    return GaLore(_groups(model, args), lr=learning_rate, seed=args.seed)
