"""What was replaced in a model, what was not, and why."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .weights import of

logger = logging.getLogger("lowrank_kernels")


@dataclass(frozen=True)
class Replaced:
    """A module that now runs on this package's ops."""

    name: str
    kind: str
    shape: tuple[int, int]
    """(N, K): out_features, in_features."""
    rank: int | dict[str, int]
    """R; by adapter's name where a layer holds several."""
    size: str = ""
    """What the report says of the correction's size; its rank, where nothing else is said."""

    def __str__(self) -> str:
        return f"{self.kind} {self.shape[0]}×{self.shape[1]}, {self.size or f'rank {self.rank}'}"


@dataclass(frozen=True)
class Skipped:
    """A module, or a setting, that had no effect, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Report:
    """What a function that changes a model in place has done. Prints as a table; ``undo`` puts the model back."""

    title: str
    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]
    trainable: int
    """Elements of parameters that require grad, right after the change."""
    total: int
    """Elements of all parameters."""
    notes: tuple[str, ...] = ()
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the model back as it was before the change. Works once; later calls do nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [
            f"{self.title}: {len(self.replaced)} replaced, {len(self.skipped)} skipped; "
            f"{self.trainable:,} of {self.total:,} parameters train "
            f"({self.trainable / max(1, self.total):.3%})"
        ]
        lines += _grouped("+", [(r.name, str(r)) for r in self.replaced])
        lines += _grouped("-", [(s.name, s.reason) for s in self.skipped])
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def _grouped(mark: str, rows: list[tuple[str, str]]) -> list[str]:
    """One line for all rows that say the same of names that differ in their numbers alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in rows:
        groups.setdefault((collapse(name), text), []).append(name)
    return [
        f"  {mark} {names[0] if len(names) == 1 else f'{name} (×{len(names)})'}: {text}"
        for (name, text), names in groups.items()
    ]


def collapse(name: str) -> str:
    """``model.layers.3.mlp`` as ``model.layers.*.mlp``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) elements of the model's parameters, each counted once; of a weight that is stored in few bits,
    the elements that it stands for."""
    stored: set[int] = set()
    total = 0
    for module in model.modules():
        with suppress(ValueError):  # one that cannot be read is counted by its bytes
            weight = of(module)
            if weight is not None:
                stored.add(id(module._parameters.get("weight")))
                total += weight.numel()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if not is_lazy(p) and id(p) not in stored]
    return sum(n for n, trains in sizes if trains), total + sum(n for n, _ in sizes)


class FirstBackward:
    """Name, after the first backward, the layers that got no gradient in it, once, in the log; then hold nothing more.

    A hook on one parameter of each layer that trains; all are taken off again together. Not on the layers: they may be
    compiled, copied and pickled as before.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._waiting: dict[str, weakref.ref[nn.Module]] = {}
        self._hooks: list[Any] = []
        self._is_queued = False
        for name, layer in layers.items():
            own = _trained(layer)
            if own:
                self._waiting[name] = weakref.ref(layer)
                self._hooks.append(own[0].register_post_accumulate_grad_hook(partial(self._reached, name)))

    def _reached(self, name: str, _: Tensor) -> None:
        if name not in self._waiting:  # for the second time: the first backward is over
            self._report()
            return
        del self._waiting[name]
        if not self._is_queued:
            self._is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._at_end)

    def _at_end(self) -> None:
        """After a backward, or after a part of one that reentrant checkpointing runs by itself: then not yet."""
        self._is_queued = False
        if torch._C._current_autograd_node() is None:
            self._report()

    def _report(self) -> None:
        layers = {name: layer for name, reference in self._waiting.items() if (layer := reference()) is not None}
        # A tool may have put other parameters in the place of those with the hooks.
        names = [
            name
            for name, layer in layers.items()
            if (own := _trained(layer)) and all(p.grad is None for p in own) and not getattr(layer, "rests", False)
        ]
        if names and self._hooks:
            logger.warning(
                "adapt: %d of the replaced layers got no gradient in the first backward: %s%s; either this batch does "
                "not reach them, or the model never calls them and their correction has no effect",
                len(names),
                ", ".join(names[:8]),
                ", ..." if len(names) > 8 else "",
            )
        self.stop()

    def stop(self) -> None:
        """Take the hooks off."""
        while self._hooks:
            self._hooks.pop().remove()


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    """What trains of a layer, besides the linear in it."""
    return [p for n, p in layer.named_parameters() if not n.startswith("base_layer.") and p.requires_grad]
