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
from .cases import OPS, Inputs, Problem, Provider, Shape
from .run import Row, call_of, measure
from .timing import interleaved

MARGIN = 0.03
"""A candidate replaces the rule's choice only where it is faster by this share, and by more than the spread."""
RULE = "rule"
"""The candidate that is what the op does without a table."""


@dataclass(frozen=True)
class Tunable:
    """What there is to choose for one op on one kind of device.

    Attributes:
        op: the name that the op looks itself up by.
        bench: the entry of ``bench.OPS`` that measures it.
        sizes: those sizes of a shape that the op's lookup knows.
        candidates: choices beside the rule's; what the op does not take for a shape runs the rule, and ties with it.
        training: measured forward and backward, the forward as the table already has it.
    """

    op: str
    bench: str
    sizes: tuple[str, ...]
    candidates: tuple[str, ...]
    training: bool = False

    def key(self, problem: Problem) -> str:
        return tuned.shape_class(self.op, problem.dtype, {name: problem.shape[name] for name in self.sizes})


_PRODUCT, _FACTORS, _BLOCKS = ("M", "K", "N"), ("K", "N", "R"), ("M", "blocks", "size")
_OWN = ("own_product", "library_product", "reference")
_CPU = (
    Tunable("lora_linear", "lora_linear", _PRODUCT, (*_OWN, "eager")),
    Tunable("dora_linear", "dora_linear", _PRODUCT, _OWN),
    Tunable("multi_lora_linear", "multi_lora_linear", _PRODUCT, _OWN),
    Tunable("lora_linear_backward", "lora_linear", _PRODUCT, (*_OWN[:2], "eager"), training=True),
    Tunable("dora_linear_backward", "dora_linear", _PRODUCT, _OWN[:2], training=True),
    Tunable("dora_weight_norm", "dora_weight_norm", _FACTORS, ("reference",)),
    Tunable("merge_lora_", "merge_lora_", _FACTORS, ("reference",)),
    Tunable("block_sparse_weight_grad", "block_sparse_weight_grad", _BLOCKS, ("reference",)),
)
# Tiles cut rows and columns of the result alone, never the reduction: a row's sum keeps its order.
_TILES = (
    "BLOCK_M=128 BLOCK_N=128 num_warps=8 num_stages=3", "BLOCK_M=128 BLOCK_N=128 num_warps=4 num_stages=4",
    "BLOCK_M=64 BLOCK_N=128 num_warps=4 num_stages=4", "BLOCK_M=64 BLOCK_N=64 num_warps=4 num_stages=5",
)  # fmt: skip
_STRATEGIES = (
    "fused",
    "two_kernel",
    "library",
    *(f"{s} {t}" for s in ("fused", "two_kernel") for t in _TILES),
)
_BACKWARD = ("two_kernel", "library", *(f"two_kernel {t}" for t in _TILES))
_CUDA = (
    Tunable("lora_linear", "lora_linear", (*_PRODUCT, "R"), (*_STRATEGIES, "eager")),
    Tunable("lora_linear_backward", "lora_linear", (*_PRODUCT, "R"), (*_BACKWARD, "eager"), training=True),
    Tunable("dora_linear", "dora_linear", (*_PRODUCT, "R"), _STRATEGIES),
    Tunable("dora_linear_backward", "dora_linear", (*_PRODUCT, "R"), _BACKWARD, training=True),
    Tunable("multi_lora_linear", "multi_lora_linear", _PRODUCT, ("one_kernel", "library")),
    Tunable("dora_weight_norm", "dora_weight_norm", _FACTORS, ("no_clusters", "triton", "reference")),
    Tunable("merge_lora_", "merge_lora_", _FACTORS, ("reference",)),
    Tunable(
        "block_sparse_weight_grad", "block_sparse_weight_grad", _BLOCKS,
        ("tiles BLOCK_M=32", "tiles BLOCK_M=128", "tiles num_warps=8", "tiles num_stages=4", "tiles splits=1",
         "reference"),
    ),
)  # fmt: skip


def tunables(device_type: str) -> dict[str, Tunable]:
    """What there is to choose on such a device, by the name that it is looked up by."""
    return {tunable.op: tunable for tunable in (_CUDA if device_type == "cuda" else _CPU)}


_CPU_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CPU_WIDTHS = ((2048, 2048), (4096, 1024), (1024, 4096))


def shapes(tunable: Tunable, device_type: str) -> Sequence[Shape]:
    """The shapes that are tuned unless others are asked for: a class is measured at its largest sizes."""
    bench = OPS[tunable.bench]
    if device_type == "cuda":
        return bench.gpu_shapes
    if tunable.sizes != _PRODUCT:
        return bench.shapes
    return [
        {name: {"M": M, "K": K, "N": N, "R": 16, "G": min(M, 8)}[name] for name in bench.shapes[0]}
        for M, (K, N) in product(_CPU_ROWS, _CPU_WIDTHS)
    ]


@dataclass(frozen=True)
class Settled:
    """What was found for one class of shapes.

    Attributes:
        choice: None: the rule's.
        over_plain: time of the choice over that of plain PyTorch.
        spread: of it.
        rule_over_plain: the same of the rule's choice; None where that was refused.
        refused: candidate -> why it was not timed: wrong, or failed.
        shape: the shape that was measured.
    """

    choice: str | None
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


def decide(rows: Sequence[Row], duel: Callable[[str], tuple[float, float]]) -> Settled:
    """The fastest right candidate; but the rule's choice, where that is right and the other does not beat it in a duel.

    There is no duel where the rule's choice loses to plain PyTorch and the other does not.

    Args:
        duel: candidate -> (its time over that of the rule's choice, spread) where these two take turns.

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
    return Settled(None if best == RULE else best, over, spread, rule_over, refused, rows[0].shape)


def settle(
    tunable: Tunable, problem: Problem, seconds: float, device: torch.device,
    run: Callable[[str, Provider], Provider] | None = None,
) -> Settled:  # fmt: skip
    """Check and time every candidate for one problem, each taking turns with plain PyTorch, the best with the rule's.

    ``run``: (candidate, the op under it) -> what is measured; for tests.
    """
    bench = OPS[tunable.bench]
    ours = bench.providers["ours"]
    with tuned.forcing(tunable.op) as force:

        def candidate(name: str) -> Provider:
            def call(inputs: Inputs) -> torch.Tensor:
                force(None if name == RULE else name)  # stays so for the backward of this call
                return ours(inputs)

            return call if run is None else run(name, call)

        names = (RULE, *tunable.candidates)
        providers = {"plain": bench.providers["plain"], **{name: candidate(name) for name in names}}

        def duel(name: str) -> tuple[float, float]:
            inputs = bench.make(problem.shape, problem.dtype, device)
            trained = bench.trained if problem.training else ()
            calls = {which: call_of(providers[which], inputs, trained) for which in (name, RULE)}
            samples = interleaved(calls, seconds, device)
            return samples[name].over(samples[RULE])

        return decide(measure(replace(bench, providers=providers), problem, providers, seconds, device), duel)


def tune(
    path: Path, work: Sequence[tuple[Tunable, Problem]], seconds: float, budget: float, device: torch.device, *,
    again: bool = False, settle: Callable[..., Settled] = settle,
) -> Iterator[tuple[str, Settled | str | None]]:  # fmt: skip
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
