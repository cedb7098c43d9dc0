"""What the patterns of a file may be, on any model and on this one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ALL_LINEAR, LoRAConfig, disagreement
from ..patterns import MAX_COST, FilePattern

_MAX_NAMES = 10_000
_MAX_PATTERNS = 2_000
_VALUES = ("rank_pattern", "alpha_pattern")


def bounded_patterns(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file, their regular expressions as :class:`~lowrank_kernels.patterns.FilePattern`.

    Raises:
        ValueError: one that is no regular expression, or that takes too long; more than 10 000 names, 2 000 patterns.
    """
    bounded, cost = dict(settings), 0
    for option in ("target_modules", "exclude_modules", "target_parameters"):
        value = settings.get(option)
        if isinstance(value, list) and len(value) > _MAX_NAMES:
            raise ValueError(f"expected {option} of at most {_MAX_NAMES} names, got {len(value)}")
        if option == "target_parameters" and isinstance(value, str):
            raise ValueError(f"expected target_parameters to be names, got {value[:80]!r}")
        if isinstance(value, str) and value != ALL_LINEAR:
            bounded[option] = _pattern(option, value)
            cost += bounded[option].cost
    for option in _VALUES:
        value = settings.get(option)
        if not isinstance(value, Mapping):
            continue
        if len(value) > _MAX_PATTERNS:
            raise ValueError(f"expected {option} of at most {_MAX_PATTERNS} patterns, got {len(value)}")
        bounded[option] = {_pattern(option, pattern): v for pattern, v in value.items()}
        cost += sum(pattern.cost for pattern in bounded[option])
    if cost > MAX_COST:
        raise ValueError(f"expected patterns that are matched in {MAX_COST} steps together, got some of {cost}")
    return bounded


def bounded_pattern_list(option: str, patterns: Sequence[str]) -> list[FilePattern]:
    """The regular expressions of a list in a file. Raises as :func:`bounded_patterns`."""
    if len(patterns) > _MAX_PATTERNS:
        raise ValueError(f"expected {option} of at most {_MAX_PATTERNS} patterns, got {len(patterns)}")
    bounded = [_pattern(option, pattern) for pattern in patterns]
    if sum(pattern.cost for pattern in bounded) > MAX_COST:
        raise ValueError(f"expected {option} to be matched in {MAX_COST} steps")
    return bounded


def _pattern(option: str, pattern: str) -> FilePattern:
    try:
        return FilePattern(pattern)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def check_patterns_agree(folder: Path, config: LoRAConfig, names: Iterable[str]) -> None:
    """Raise ValueError where two patterns give one layer different values.

    PEFT sorts them when it writes a config, so that which of them was the first is not known any more.
    """
    for name in names:
        for option in _VALUES:
            patterns = getattr(config, option)
            if found := disagreement(patterns, name):
                first, second = (f"{pattern[:80]!r}: {patterns[pattern]}" for pattern in found)
                raise ValueError(
                    f"load_adapter: expected {option} in {folder} to give {name} one value, got {first} and {second}; "
                    f"which PEFT trained with depends on their order, which it does not keep: leave one of them"
                )


def with_patterns_that_agree(config: LoRAConfig, names: Iterable[str]) -> LoRAConfig:
    """The same settings for these layers, whatever order their patterns are read in.

    Where two patterns give one layer different values, each layer of an own value gets a pattern of its own.
    """
    layers = list(names)
    changed: dict[str, Any] = {}
    for option, value_of in (("rank_pattern", config.rank_of), ("alpha_pattern", config.alpha_of)):
        if any(disagreement(getattr(config, option), name) for name in layers):
            common = config.r if option == "rank_pattern" else config.alpha
            values = {f"^{re.escape(name)}": value_of(name) for name in layers}
            changed[option] = {pattern: value for pattern, value in values.items() if value != common}
    return replace(config, **changed) if changed else config
