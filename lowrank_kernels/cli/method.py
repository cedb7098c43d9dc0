"""What `lrk train` needs to know of a method: one row of the table in ``methods.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lowrank_kernels as lk

from ..rider import Rider
from . import arguments
from .batches import Batch
from .loop import adamw

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a decoder layer, which every method with layers adapts."""

Batches = Callable[[int], Iterator[Batch]]
"""Makes an endless iterator of batches of so many examples."""


class Prepared(NamedTuple):
    """What a method did to the model before its first step.

    Attributes:
        report: of `lk.adapt`; None for a method that trains the model's own parameters, without a layer.
        start: what a resumed run needs of this one's start beside the weights, as `torch.save` takes it.
    """

    report: lk.Report | None = None
    start: Any = None


Prepare = Callable[[Any, argparse.Namespace, Batches, Any], Prepared]
MakeOptimizer = Callable[[Any, float, argparse.Namespace], torch.optim.Optimizer]
Ride = Callable[[Any, torch.optim.Optimizer, argparse.Namespace, list[Batch]], Rider]
Save = Callable[[Any, Any, Prepared, Path], str]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        summary: what is special about it, for `lrk train --help`.
        prepare: (model, args, batches, start) -> :class:`Prepared`. Adapts the model in place, or chooses by
            ``requires_grad`` what trains. ``start`` is that of the run that is resumed, whose weights are about to be
            loaded; None for a new run.
        save: (model, tokenizer, prepared, folder) -> what was written, in words.
        options: the groups of options that it takes.
        optimizer: (model, learning rate, args) -> the optimizer of all that requires grad.
        learning_rate: the default.
        defaults: of options, by name, where they are other than the groups say.
        ride: (model, optimizer, args, validation) -> what rides on the optimizer, such as a chain that merges and
            restarts; None: nothing. ``validation`` are batches that are not trained on, for a method with the option
            ``--validation-examples``.
        changes_base: the weights under the layers change too, so that a checkpoint holds them.
    """

    summary: str
    prepare: Prepare
    save: Save
    options: tuple[arguments.OptionGroup, ...] = ()
    optimizer: MakeOptimizer = lambda model, lr, args: adamw(model, lr)
    learning_rate: float = 2e-3
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ride: Ride | None = None
    changes_base: bool = False


def save_model(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write the whole model, with the layers taken out, for a method that changes the model's own weights."""
    if prepared.report is not None:
        prepared.report.undo()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model written to {folder}"
