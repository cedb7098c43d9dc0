"""Which way of running an op is right and fastest on this device: what `lrk tune` does for one class of shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .. import tuned
from .cases import OPS, Inputs, Problem, Provider, Shape, Tunable
from .cases.bench import PRODUCT
from .run import Row, call_of, measure
from .timing import interleaved

MARGIN = 0.03
"""A candidate replaces the rule's plan only where it is faster by this share, and by more than the spread."""
RULE = "rule"
"""The candidate that is what the op does without a table."""


def words(fields: tuned.Fields) -> str:
    """A candidate's name: "base=own"; "rule" for no fields."""
    return " ".join(f"{name}={value}" for name, value in fields.items()) or RULE


_CPU_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CPU_WIDTHS = ((2048, 2048), (4096, 1024), (1024, 4096))


def shapes(tunable: Tunable, device_type: str) -> Sequence[Shape]:
    """The shapes that are tuned unless others are asked for: a class is measured at its largest sizes."""
    bench = OPS[tunable.bench]
    if device_type == "cuda":
        return bench.gpu_shapes
    if tunable.sizes != PRODUCT:
        return bench.shapes
    return [
        {name: {"M": M, "K": K, "N": N, "R": 16, "G": min(M, 8)}[name] for name in bench.shapes[0]}
        for M, (K, N) in product(_CPU_ROWS, _CPU_WIDTHS)
    ]


@dataclass(frozen=True)
class Settled:
    """What was found for one class of shapes.

    Attributes:
        plan: fields of the op's plan; none: the rule's.
        over_plain: time of that plan over that of plain PyTorch.
        spread: of it.
        rule_over_plain: the same of the rule's plan; None where that was refused.
        refused: candidate -> why it was not timed: wrong, or failed.
        shape: the shape that was measured.
    """

    plan: tuned.Fields
    over_plain: float
    spread: float
    rule_over_plain: float | None
    refused: dict[str, str] = field(default_factory=dict)
    shape: str = ""

    @property
    def slower_than_plain(self) -> bool:
        """Whether even the best candidate loses to plain PyTorch by more than the spread."""
        return _loses(self.over_plain, self.spread)


def _loses(over_plain: float, spread: float) -> bool:
    return over_plain * (1 - spread) > 1 + MARGIN


def decide(
    rows: Sequence[Row], duel: Callable[[str], tuple[float, float]], plans: Mapping[str, tuned.Fields]
) -> Settled:
    """The fastest right candidate; but the rule's plan, where that is right and the other does not beat it in a duel.

    There is no duel where the rule's plan loses to plain PyTorch and the other does not.

    Args:
        duel: candidate -> (its time over that of the rule's plan, spread) where these two take turns.
        plans: candidate -> the fields that it stands for.

    Raises:
        ValueError: no candidate was right.
    """
    right = [row for row in rows if row.provider != "plain" and row.over_floor is not None]
    refused = {row.provider: row.reason for row in rows if row.reason}
    if not right:
        raise ValueError(f"{rows[0].op} {rows[0].shape}: every candidate was refused: {refused}")
    ratio = {row.provider: (row.over_floor or 0.0, row.spread or 0.0) for row in right}
    best = min(ratio, key=lambda name: ratio[name][0])
    if RULE in ratio and best != RULE and (_loses(*ratio[best]) or not _loses(*ratio[RULE])):
        over_rule, spread = duel(best)
        if 1 - over_rule <= max(over_rule * spread, MARGIN):
            best = RULE
    over, spread = ratio[best]
    rule_over = ratio[RULE][0] if RULE in ratio else None
    return Settled(plans[best], over, spread, rule_over, refused, rows[0].shape)


def settle(
    tunable: Tunable,
    problem: Problem,
    seconds: float,
    device: torch.device,
    run: Callable[[str, Provider], Provider] | None = None,
) -> Settled:
    """Check and time every candidate for one problem, each taking turns with plain PyTorch, the best with the rule's.

    ``run``: (candidate, the op under it) -> what is measured; for tests.
    """
    bench = OPS[tunable.bench]
    ours = bench.providers["ours"]
    with tuned.forcing(tunable.op) as force:

        def candidate(name: str) -> Provider:
            def call(inputs: Inputs) -> torch.Tensor:
                if forced != [name]:
                    force(plans[name])  # stays so for the backward of this call
                    forced[:] = [name]
                return ours(inputs)

            return call if run is None else run(name, call)

        plans = {words(fields): fields for fields in ({}, *tunable.candidates)}
        forced: list[str] = []
        providers = {"plain": bench.providers["plain"], **{name: candidate(name) for name in plans}}

        def duel(name: str) -> tuple[float, float]:
            inputs = bench.make(problem.shape, problem.dtype, device)
            trained = bench.trained if problem.training else ()
            calls = {which: call_of(providers[which], inputs, trained) for which in (name, RULE)}
            samples = interleaved(calls, seconds, device)
            return samples[name].over(samples[RULE])

        return decide(measure(replace(bench, providers=providers), problem, providers, seconds, device), duel, plans)


def tune(
    path: Path,
    work: Sequence[tuple[Tunable, Problem]],
    seconds: float,
    budget: float,
    device: torch.device,
    *,
    again: bool = False,
    settle: Callable[..., Settled] = settle,
) -> Iterator[tuple[str, Settled | str | None]]:
    """Settle what the table at ``path`` does not hold yet, and write it after each class of shapes.

    A table made under other conditions is started anew; the other device type's part stays. After ``budget`` seconds
    no class is begun.

    Yields:
        (class, what was found), or why nothing was; (class, None) for one that the time did not suffice for.
    """
    table = tuned.read_table(path)
    conditions = tuned.conditions(device.type)
    part: dict[str, Any] = table.get(device.type, {})
    if part.get("conditions") != conditions:
        part = {"conditions": conditions, "margin": MARGIN, "entries": {}}
    entries: dict[str, Mapping[str, Any]] = part["entries"]
    end = time.monotonic() + budget
    seen = set() if again else set(entries)
    for tunable, problem in work:
        key = tunable.key(problem)
        if key in seen:
            continue
        seen.add(key)
        if time.monotonic() > end:
            yield key, None
            continue
        try:
            found = settle(tunable, problem, seconds, device)
        except ValueError as error:
            yield key, str(error)
            continue
        entries[key] = asdict(found)
        tuned.write_table(path, {**table, device.type: {**part, "date": time.strftime("%Y-%m-%d")}})
        tuned.forget()  # what is measured next, a step after its forward say, runs as it will
        yield key, found
