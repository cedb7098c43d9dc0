"""What a call does, decided once for all that is known of it before its values: ``plan(op, call)``.

A plan says which backend runs, who makes each product, by which strategy and tiles, and why. It is made from the
metadata of a call alone, remembered, and forgotten when the table of `lrk tune` is read again. Launchers take it and
decide nothing; `lrk doctor --explain` prints it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..kernels.lora_tiles import LoRATiles, Strategy, coded_strategy, lora_tiles
from ..kernels.target import Target, target_of
from ..weights import CodedWeight, FrozenWeight
from . import cpu_rules
from .backend import BACKENDS, automatic, interpreted, why_not
from .library import kinds_of
from .operands import as_rows, factor

logger = logging.getLogger("lowrank_kernels")
OWN, LIBRARY = "own", "library"
_INTERPRETED = interpreted()
_PLAIN = (Tensor, torch.nn.Parameter)


def _has_values(t: Any) -> bool:
    """True for a tensor whose elements lie in its own storage: none that is fake, or wraps others."""
    return type(t) in _PLAIN or (isinstance(t, Tensor) and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__)


class Meta(NamedTuple):
    """What is known of a tensor without its values. ``aligned``: its first element is at a multiple of 16 bytes;
    ``coded``: a weight of codes, which kernels decode as they multiply."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False
    aligned: bool = True
    format: str = "dense"
    coded: bool = False

    @classmethod
    def of(cls, t: Tensor | FrozenWeight) -> Meta:
        if isinstance(t, FrozenWeight):
            return cls(t.shape, t.stride(), t.dtype, t.device, format=t.format, coded=isinstance(t, CodedWeight))
        aligned = t.device.type == "meta" or (_has_values(t) and t.data_ptr() % 16 == 0)
        return cls(t.shape, t.stride(), t.dtype, t.device, t.requires_grad, aligned)

    @classmethod
    def contiguous(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> Meta:
        return cls(shape, torch.empty(shape, device="meta").stride(), dtype, device)

    def dim(self) -> int:
        return len(self.shape)

    @property
    def empty(self) -> bool:
        return 0 in self.shape

    @property
    def whole(self) -> bool:
        """True where elements lie one after the other in the order of their indices."""
        return bool(torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous())

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def readable(self) -> bool:
        """True where kernels read it as it lies: adjacent columns, and no float64."""
        return self.dtype != torch.float64 and self.dim() > 0 and (self.stride[-1] == 1 or self.shape[-1] == 1)

    def as_operand(self) -> Meta:
        """Of the matrix that kernels get for it: (M, C), neighbours of a row adjacent, no float64."""
        given = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        matrix = factor(as_rows(given))
        # A copy is. Not told by ``_base``, which views have not in inference mode and below the dispatcher.
        aligned = self.aligned or not torch._C._is_alias_of(matrix, given)  # type: ignore[attr-defined]
        return self._replace(shape=matrix.shape, stride=matrix.stride(), dtype=matrix.dtype, aligned=aligned)

    @property
    def describable(self) -> bool:
        """True where hardware can copy tiles of this matrix: adjacent columns, rows at multiples of 16 bytes."""
        row_bytes = self.stride[0] * self.dtype.itemsize
        return self.stride[1] == 1 and not self.empty and self.aligned and row_bytes % 16 == 0


class Reason(NamedTuple):
    """One decision: a field of the plan, its value in words, and where it comes from ("rule: ...", "table", ...)."""

    field: str
    value: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Everything that is decided for a call.

    Attributes:
        backend: "reference", "cpu" (C++), "triton" or "cuda" (CUDA C++).
        base: who multiplies by the frozen weight: "own" kernels, with the correction in their accumulators, or the
            "library" (PyTorch), to whose result it is added. In a backward: of dY W.
        down, up, grad: who makes the products with a factor: x Aᵀ (or dY B), P Bᵀ (or Q A), and A's gradient.
        eager: PyTorch's calls in place of this package's op, where no autocast is on.
        direct: one call of the extension in place of the op, where nobody observes the call.
        ready: every operand lies as kernels read it; else it is copied first.
        tiles: of the Triton kernels, strategy included; what they are depends on the op.
        clusters: the CUDA C++ norm shares what it reads among clusters of blocks.
        norm: DoRA's: the plan of the norm, or "inside": the product makes it too; None where it is given.
        remembers: DoRA's column scale may come from a ``ScaleCache``.
        unsorted: many adapters' rows need no plan of the batch beforehand.
        by_rows: the norm of a weight that is not dense is made of blocks of dense rows.
        reasons: every decision with its reason.
    """

    op: str
    backend: str
    base: str = LIBRARY
    down: str = OWN
    up: str = OWN
    grad: str = OWN
    eager: bool = False
    direct: bool = False
    ready: bool = False
    tiles: Any = None
    clusters: bool = True
    norm: Plan | str | None = None
    remembers: bool = False
    unsorted: bool = False
    by_rows: bool = False
    reasons: tuple[Reason, ...] = ()


class Choosing:
    """A plan in the making."""

    def __init__(self, op: str, like: Meta, target: Target | None) -> None:
        self.op, self.like = op, like
        self._target = target
        self._fields: dict[str, Any] = {}
        self._reasons: list[Reason] = []

    @property
    def device_type(self) -> str:
        return "cuda" if self.like.device.type == "cuda" else "cpu"

    @property
    def target(self) -> Target:
        return self._target or target_of(self.like.device)

    def take(self, field: str, value: Any, why: str, words: str | None = None) -> Any:
        """Decide a field; a later decision replaces an earlier one."""
        self._fields[field] = value
        self._reasons = [reason for reason in self._reasons if reason.field != field]
        self._reasons.append(Reason(field, str(value) if words is None else words, why))
        return value

    def refine(self, field: str, value: Any) -> None:
        """Another value of a decided field, for the same reason."""
        self._fields[field] = value

    def ready(self, *operands: Meta | None, rows: Meta) -> None:
        """Whether operands need no copy; ``rows`` (x or dY) must be a matrix for that."""
        lie = rows.dim() == 2 and all(t is None or (t.readable and t.dim() < 3) for t in operands)
        self.take("ready", lie, "rule: adjacent columns, no float64" if lie else "rule: an operand is copied first")

    @property
    def own(self) -> bool:
        return self._fields.get("base") == OWN

    def settled(self, op: str, sizes: Mapping[str, int]) -> tuple[Mapping[str, Any], str]:
        """What `lrk tune` settled for such sizes, and in which words that is said; nothing where it did not."""
        return tuned.settled(op, self.device_type, self.like.dtype, sizes)

    def backend(self, given: str, settled: Mapping[str, Any], source: str) -> str:
        """Which backend runs: the one that the caller names, else the table's, else the one for such tensors.

        Raises:
            ValueError: an unknown backend, or a named one that cannot run here, with the reason.
        """
        device_type, dtype = self.like.device.type, self.like.dtype
        if given != "auto":
            if given not in BACKENDS:
                raise ValueError(f"{self.op}: expected backend to be one of {', '.join(BACKENDS)}, got {given!r}")
            reason = why_not(self.op, given, device_type, dtype)
            if reason is not None:
                raise ValueError(f"{self.op}: backend '{given}' cannot run here: {reason}")
            return str(self.take("backend", given, "named by the caller"))
        chosen = settled.get("backend")
        if chosen in BACKENDS[1:] and why_not(self.op, chosen, device_type, dtype) is None:
            return str(self.take("backend", chosen, source))
        name, reason = automatic(self.op, device_type, dtype)
        if name == "reference":
            _say_once(f"{self.op}: backend 'auto' runs 'reference' here: {reason}")
        return str(self.take("backend", name, f"rule: {reason or 'the kernels for such tensors'}"))

    def base(
        self,
        x: Meta,
        weight: Meta,
        settled: Mapping[str, Any],
        source: str,
        *,
        backward: bool = False,
        coded: bool = False,
    ) -> str:
        """On a CPU: who multiplies x (M, K), or in a backward dY (M, N), by the frozen weight.

        ``coded``: the op's own product takes codes, too.
        """
        n, k = weight.shape
        inner, width = (n, k) if backward else (k, n)
        rule = cpu_rules.own_gradient if backward else cpu_rules.own_forward
        if weight.coded and coded:
            return str(self.take("base", OWN, f"rule: {weight.format} is decoded as it is multiplied"))
        if weight.format not in ("dense", "experts"):
            return str(self.take("base", LIBRARY, f"rule: {weight.format} weights multiply by themselves"))
        if weight.stride[1] != 1 and weight.format == "dense":
            return str(self.take("base", LIBRARY, "rule: the extension takes weights with adjacent columns"))
        if cpu_rules.library_reads_past_rows(x.dtype, x.device.type, inner):
            return str(self.take("base", OWN, "rule: PyTorch's product reads past rows of this odd width"))
        if settled.get("base") in (OWN, LIBRARY):
            return str(self.take("base", settled["base"], source))
        own = rule(x.dtype, x.rows, inner, width)
        return str(self.take("base", OWN if own else LIBRARY, f"rule: {_rows(x)} on {cpu_rules.isa()}"))

    def thin(self, field: str, rows: Meta, inner: int, dropout: bool) -> str:
        """On a CPU: who makes a product of these rows with a factor, summed over ``inner`` elements."""
        library = cpu_rules.library_thin(rows.dtype, rows.rows, inner, dropout)
        words = f"{_rows(rows)} of {str(rows.dtype).removeprefix('torch.')} on {cpu_rules.isa()}"
        why = "dropout is drawn as it is read" if dropout else words
        return str(self.take(field, LIBRARY if library else OWN, f"rule: {why}"))

    def lora_tiles(
        self,
        rows: Meta,
        weight: Meta,
        rank: int,
        dropout: bool,
        settled: Mapping[str, Any],
        source: str,
        **options: Any,
    ) -> LoRATiles:
        """For Triton: strategy and tiles of a product of rows (x or dY) with the weight."""
        sizes = rows.shape[0], weight.shape[1], weight.shape[0], rank
        strategy: Strategy | None = None
        if weight.coded:  # the correction is made in the accumulators of W's own kernel
            strategy = coded_strategy(self.target, rows.shape[0], rank, rows.dtype, dropout)
        elif weight.format != "dense":
            strategy = "library"
        settled = settled if strategy is None else {}
        aligned = rows.describable and (weight.coded or (strategy is None and weight.describable))
        tiles = lora_tiles(
            self.target, *sizes, rows.dtype, dropout, strategy=strategy, aligned=aligned, settled=settled, **options
        )
        why = source if settled.get("strategy") == tiles.strategy else f"rule: roofline of {self.target.arch}"
        if strategy is not None:
            why = f"rule: {weight.format} weights have a product of their own"
        self.take("tiles", tiles, why, tiles.strategy)
        return tiles

    def done(self) -> Plan:
        return Plan(self.op, reasons=tuple(self._reasons), **self._fields)


def _rows(x: Meta) -> str:
    return f"{x.rows} row{'' if x.rows == 1 else 's'}"


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


_DECIDERS: dict[str, Callable[..., Plan]] = {}
REMEMBERED = 4096
"""Calls of different sizes that are remembered; then all are forgotten."""
_VALUES = ("scaling", "scale", "dropout_seed", "seed", "step", "lr", "beta1", "beta2", "eps", "weight_decay")
"""Arguments whose value no plan depends on, and which differ from call to call."""


def _key_of(record: Any) -> Callable[[Any], tuple[Any, ...]]:
    """A function that gives all that plans may depend on in a record of the op: metadata of tensors, other values.

    Compiled, as dataclasses are: at one token a loop over the fields would take longer than the correction.
    """
    words = []
    for field, kind in kinds_of(record).items():
        meta = f"c.{field}.shape, c.{field}.stride(), c.{field}.dtype, c.{field}.device, c.{field}.requires_grad"
        if kind in ("Tensor", "Weight", "Written") and field not in _VALUES:
            words.append(meta + f", type(c.{field})" * (kind == "Weight"))
        elif kind == "Tensor | None" and field not in _VALUES:
            words.append(f"None if c.{field} is None else ({meta})")
        elif kind.startswith(("tuple", "Sequence")):
            words.append(f"None if c.{field} is None else tuple(c.{field})")
        elif field not in _VALUES:
            words.append(f"c.{field}, type(c.{field})" if kind in ("bool", "float") else f"c.{field}")
    made: dict[str, Any] = {}
    exec(f"def key(c): return ({', '.join(words)},)", made)
    key: Callable[[Any], tuple[Any, ...]] = made["key"]
    return key


class Planner:
    """The plans of one op, made when metadata is first seen and remembered.

    Args:
        record: NamedTuple of the op's arguments.
        decide: ``decide(call, records, target)`` makes a plan from the record with a Meta for each tensor.
        check: ``check(call)`` returns the error of operands that do not fit together, or None; asked once for all of
            a call's metadata.
        state: what else the plans depend on.
    """

    def __init__(
        self,
        op: str,
        record: Any,
        decide: Callable[[Any, bool, Target | None], Plan],
        check: Callable[[Any], Exception | None] = lambda call: None,
        *,
        state: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self.op, self.decide, self.check, self.state, self._key = op, decide, check, state, _key_of(record)
        self._memories: dict[str, dict[Hashable, Plan]] = {}
        self._change(anew=True)
        _DECIDERS[op] = decide
        tuned.on_change(self._change)

    def _change(self, anew: bool) -> None:
        if anew:
            self._memories.clear()
        self._memory = self._memories.setdefault(tuned.forced(), {})

    def __call__(self, call: Any) -> Plan | None:
        """The plan of a call; None where sizes are symbols, or tensors have no values.

        Raises:
            ValueError, TypeError: what ``check`` returned; a backend that cannot run here.
        """
        key = None
        try:
            key = (self._key(call), torch.is_grad_enabled(), _state(call), self.state())
            found = self._memory.get(key)
            if found is not None:
                return found
        except (AttributeError, TypeError):  # no tensor, or sizes that are symbols
            key = None
        error = self.check(call)
        if error is not None:
            raise error
        if key is None or any(isinstance(t, Tensor) and not _has_values(t) for t in call):
            return None
        of = metas(call)
        records = torch.is_grad_enabled() and any(isinstance(m, Meta) and m.requires_grad for m in of)
        if len(self._memory) >= REMEMBERED:
            self._memory.clear()
        made = self._memory[key] = self.decide(of, records, None)
        return made

    def known(self, call: Any) -> Plan:
        """The plan of a call of tensors with values."""
        made = self(call)
        assert made is not None
        return made


def _state(call: Any) -> Hashable:
    """Beside a call's metadata: autocast, and where Triton's kernels may run, which tensors begin at 16 bytes."""
    first = call[0]
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(first.device.type)
    if not (first.is_cuda or _INTERPRETED):
        return autocast
    return autocast, tuple([t.data_ptr() % 16 == 0 for t in call if _has_values(t)])


def metas(call: Any) -> Any:
    """A record with a Meta in place of each tensor."""
    return call._make(Meta.of(value) if isinstance(value, (Tensor, FrozenWeight)) else value for value in call)


def plan(op: str, call: Any, *, records: bool = False, target: Target | None = None) -> Plan:
    """What ``op`` does in a call.

    Args:
        call: the op's record, with tensors or a Meta for each.
        records: gradients are recorded.
        target: the GPU; None for that of the tensors' device.
    """
    return _DECIDERS[op](metas(call), records, target)
