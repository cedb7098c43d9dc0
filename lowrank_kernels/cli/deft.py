"""DEFT, as `lrk train` runs it: LoRA, a term in the loss, and how dense the activations are over time."""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers import answer_loss
from ..losses import Density, DensityReport, density_report
from ..rider import Rider, history_of, note
from . import arguments
from .batches import Batch

DENSITY: arguments.OptionGroup = {
    "--density-alpha": {
        "type": arguments.number(),
        "default": 1.0,
        "help": "{methods}: α, weight of the density in the loss (default 1)",
    },
    "--density-eps": {
        "type": arguments.number(above=0.0),
        "default": 1e-7,
        "help": "{methods}: ε of o² / (o² + ε), the activations' density (default 1e-7)",
    },
    "--density-every": {
        "type": arguments.count,
        "default": 25,
        "help": "{methods}: steps between measurements of the density on the validation examples (default 25)",
    },
}


class DEFT(Rider):
    """Adds the density to the loss of each batch, and notes it on validation batches, before training and after."""

    key = "deft"
    history: dict[str, Any]

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, batches: list[Batch]):
        super().__init__(optimizer, "DEFT")
        self.model, self.batches, self.eps = model, batches, args.density_eps
        self.every, self.last = args.density_every, args.steps
        self.term = Density(model.get_decoder(), args.density_alpha, eps=self.eps)
        self.steps = 0
        before = self.measure()
        self.history = history_of(f"share of activations above {before.threshold:.3g}", before.layers)
        note(self.history, 1, before.layers)
        self._detach.append(self.term.remove)
        self.attach()

    def measure(self) -> DensityReport:
        return density_report(
            self.model.get_decoder(),
            self.batches,
            lambda _, batch: answer_loss(self.model, **batch),
            threshold=self.eps**0.5,
        )

    def extra_loss(self) -> Tensor:
        return self.term()

    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0 or self.steps == self.last:
            note(self.history, self.steps + 1, self.measure().layers)
        if self.steps == self.last:
            means = [sum(row) / len(row) for row in self.history["values"]]
            print(f"{self.history['what']}: {means[0]:.2%} -> {means[-1]:.2%}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "history": copy.deepcopy(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.history = copy.deepcopy(state["history"])


def deft(model: Any, optimizer: torch.optim.Optimizer, args: argparse.Namespace, validation: list[Batch]) -> DEFT:
    return DEFT(model, optimizer, args, validation)
