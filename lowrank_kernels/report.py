"""What was replaced in a model, what was not, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


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
    """(trainable, total) elements of the model's parameters, each counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
