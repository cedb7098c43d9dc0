"""``LoRAStack``: the adapters of one linear, of any ranks, one after another in two tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float] | tuple[Tensor, Tensor, float, Tensor]


SlicedFactors = Sequence[Factors | None]


class Place(NamedTuple):
    """Where an adapter lies, rows ``start : start + rank`` of both factors; scaling; row of magnitudes, if any.

    In a sliced stack ``slices`` has (rank, scaling) of each slice, and ``rank`` is the largest of them.
    """

    start: int
    rank: int
    scaling: float
    magnitude: int = -1
    slices: tuple[tuple[int, float], ...] = ()


_NOWHERE = Place(0, 0, 0.0)


class _Given(NamedTuple):
    """An adapter as a stack keeps it: ``lora_a`` (R, K) or (S, R, K), ``lora_b`` (R, N), a place without a start."""

    lora_a: Tensor
    lora_b: Tensor
    place: Place
    magnitude: Tensor | None


class LoRAStack:
    """Adapters of one linear (K → N), ragged: adapter i is rows start_i : start_i + R_i of ``lora_a`` and ``lora_b``.

    Attributes:
        lora_a: (ΣR, K) and
        lora_b: (ΣR, N), any float dtype; they may require grad. Row r of ``lora_b`` is column r of PEFT's B.
        magnitude: (D, N), DoRA's m, a row for each of the D DoRA adapters; None where there is none.
        table: (G, 3) int32: start, rank and row of ``magnitude`` (-1: LoRA) of each adapter; the kernels read it.
        scalings: (G,) float32, applied at run time, never folded into a factor.
        places: the same on the host.
        max_rank: the largest R.
        has_dora: whether there is a DoRA adapter; magnitudes may outlive the last one.
        slices: widths of the slices of N; (N,) unless the linear is several projections in one.

    A sliced stack is for one weight of several projections, one below the other (Q, K, V; gate, up): N = Σ N_s. An
    adapter then has factors of its own for each slice, A_s (R_s, K) and B_s (N_s, R_s) with scaling s_s, or none for
    some of them. ``lora_a`` is (S, ΣR, K), R being the largest of an adapter's R_s; slice s of it lies in
    ``lora_a[s]`` and in the slice's columns of ``lora_b``, in the same rows, so that B takes no more than its own
    columns. ``table`` is (S, G, 3) and ``scalings`` (S, G).

    Nothing is padded to a common rank: the factors take Σ R (K + N) elements. An id i < G whose adapter was removed has
    rank 0, and its rows get the base product alone. ``add`` and ``remove`` leave the other adapters where they are and
    never write to ``table`` or ``scalings`` in place: a :meth:`snapshot` keeps describing what it described.
    """

    def __init__(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        places: Sequence[Place],
        magnitude: Tensor | None = None,
        *,
        slices: Sequence[int] | None = None,
        table_and_scalings: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.lora_a, self.lora_b, self.magnitude = lora_a, lora_b, magnitude
        self.slices = (lora_b.shape[1],) if slices is None else tuple(slices)
        self.places = tuple(places)
        self._tensors = table_and_scalings  # made when they are first read
        self._measure()

    # -------------------------------------------------------------------------------------------------- making

    @classmethod
    def from_factors(
        cls, adapters: Iterable[Factors | SlicedFactors], *, slices: Sequence[int] | None = None
    ) -> LoRAStack:
        """Stack adapters given as (lora_a (R, K), lora_b (N, R), scaling), for DoRA with a magnitude (N,) as fourth.

        With ``slices``, the widths (N_1, ..., N_S), an adapter is a sequence of S such tuples, each with the N of its
        slice, None for a slice without one: ``from_factors([(q, k, v), (q, None, v)], slices=(4096, 1024, 1024))``.
        Factors are copied, in the widest of their dtypes; gradients of the stack's tensors reach those that train.
        A layer's are ``(*layer.factors(), layer.scaling)``, its gate in its B.

        Raises:
            ValueError: no adapter, shapes or devices that do not fit, a scaling that is not finite.
            TypeError: something that is not a float tensor.
        """
        given = [_checked(f"adapter {i}", factors, slices) for i, factors in enumerate(adapters)]
        if not given:
            raise ValueError("LoRAStack.from_factors: expected at least one adapter, got none; see LoRAStack.empty")
        first, dtype, start, dora, places = given[0], given[0].lora_a.dtype, 0, 0, []
        for i, (lora_a, lora_b, place, magnitude) in enumerate(given):
            dtype = torch.promote_types(dtype, torch.promote_types(lora_a.dtype, lora_b.dtype))
            if (lora_a.shape[-1], lora_b.shape[1]) != (first.lora_a.shape[-1], first.lora_b.shape[1]):
                raise ValueError(
                    f"LoRAStack: expected adapter {i} of (K, N) = ({first.lora_a.shape[-1]}, {first.lora_b.shape[1]}) "
                    f"like adapter 0, got ({lora_a.shape[-1]}, {lora_b.shape[1]})"
                )
            if lora_a.device != first.lora_a.device:
                raise ValueError(f"LoRAStack: expected adapter {i} on {first.lora_a.device} like adapter 0")
            places.append(place._replace(start=start, magnitude=-1 if magnitude is None else dora))
            start += place.rank
            dora += magnitude is not None
        magnitudes = [m.to(dtype) for *_, m in given if m is not None]
        return cls(
            torch.cat([a.to(dtype) for a, *_ in given], dim=-2),
            torch.cat([b.to(dtype) for _, b, *_ in given]),
            places,
            torch.stack(magnitudes) if magnitudes else None,
            slices=slices,
        )

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        *,
        slices: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LoRAStack:
        """A stack of no adapters, to ``add`` to."""
        if slices is not None and sum(slices) != out_features:
            raise ValueError(f"LoRAStack.empty: expected slices that add up to N = {out_features}, got {slices}")
        options: Any = {"dtype": dtype, "device": torch.device(device)}
        lead = () if slices is None else (len(slices),)
        return cls(
            torch.empty(*lead, 0, in_features, **options), torch.empty(0, out_features, **options), (), slices=slices
        )

    def snapshot(self) -> LoRAStack:
        """The stack as it is now: shares the factors, and no later ``add``, ``remove`` or ``compact`` changes it.

        The factors of an adapter that is removed stay readable until another adapter is added in their place.
        """
        return copy.copy(self)

    # ------------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return len(self.places)

    @property
    def is_sliced(self) -> bool:
        return self.lora_a.dim() == 3

    @property
    def in_features(self) -> int:
        return self.lora_a.shape[-1]

    @property
    def out_features(self) -> int:
        return self.lora_b.shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(place.rank for place in self.places)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each adapter."""
        return tuple(place.start for place in self.places)

    @property
    def nbytes(self) -> int:
        """Of the factors and magnitudes, gaps that removals left included."""
        tensors = (self.lora_a, self.lora_b, self.magnitude)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def columns(self, of_slice: int) -> slice:
        """Columns of y, rows of the weight, that a slice is."""
        first = sum(self.slices[:of_slice])
        return slice(first, first + self.slices[of_slice])

    def factors(self, adapter: int, of_slice: int = 0) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """(lora_a (R, K), lora_b (N, R), scaling, magnitude (N,) or None) of an adapter, as views.

        In a sliced stack those of one of its slices; R is 0 where the adapter has none there.
        """
        start, rank, scaling, row, slices = self.places[adapter]
        rank, scaling = slices[of_slice] if slices else (rank, scaling)
        columns = self.columns(of_slice)
        lora_a = self.lora_a[of_slice] if self.is_sliced else self.lora_a
        own = slice(start, start + rank)
        magnitude = None if row < 0 or self.magnitude is None else self.magnitude[row, columns]
        return lora_a[own], self.lora_b[own, columns].T, scaling, magnitude

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoRAStack:
        """A stack with copies on another device or in another dtype; of what is there already, itself."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device, dtype)
        slices = self.slices if self.is_sliced else None
        return LoRAStack(
            self.lora_a.to(device, dtype), self.lora_b.to(device, dtype), self.places, magnitude, slices=slices
        )

    def with_spare(self, each: int) -> LoRAStack:
        """The same adapters with an id of rank 0 after every ``each`` of them: for rows without an adapter."""
        places = [p for i in range(0, len(self), each) for p in (*self.places[i : i + each], _NOWHERE)]
        return LoRAStack(self.lora_a, self.lora_b, places, self.magnitude)

    # ------------------------------------------------------------------------------------------------ changing

    def add(
        self, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None = None, *, at: int | None = None
    ) -> int:
        """Copy an adapter in and return its id, the first free one unless ``at`` names one. The others stay in place.

        It goes into the first gap that holds it, or at the end; the tensors are made larger only when neither does,
        and by what is missing. With ``at`` beyond the last id, the ids between are free ones.

        Raises:
            ValueError, TypeError: as :meth:`from_factors`, factors that do not fit this stack's linear, an id that is
                taken, a sliced stack. The stack is then as it was.
            RuntimeError: the factors train (their optimizer state would no longer fit them).
        """
        if self.is_sliced:
            raise ValueError("LoRAStack.add: expected a stack without slices; use add_sliced")
        factors = (lora_a, lora_b, scaling) if magnitude is None else (lora_a, lora_b, scaling, magnitude)
        return self._add("add", factors, None, at)

    def add_sliced(self, factors: SlicedFactors, *, at: int | None = None) -> int:
        """:meth:`add` for a sliced stack: a tuple, or None, for each slice, as :meth:`from_factors` takes them."""
        if not self.is_sliced:
            raise ValueError("LoRAStack.add_sliced: expected a stack with slices; use add")
        return self._add("add_sliced", factors, self.slices, at)

    @torch.no_grad()
    def _add(self, verb: str, factors: Factors | SlicedFactors, slices: Sequence[int] | None, at: int | None) -> int:
        self._refuse_training(verb)
        lora_a, lora_b, place, magnitude = _checked("the adapter", factors, slices)
        if (lora_a.shape[-1], lora_b.shape[1]) != (self.in_features, self.out_features):
            raise ValueError(
                f"LoRAStack.{verb}: expected factors of (K, N) = ({self.in_features}, {self.out_features}), "
                f"got ({lora_a.shape[-1]}, {lora_b.shape[1]})"
            )
        adapter = next((i for i, p in enumerate(self.places) if p.rank == 0), len(self)) if at is None else at
        if adapter < 0 or (adapter < len(self) and self.places[adapter].rank):
            raise ValueError(f"LoRAStack.{verb}: expected at to be a free id, got {at}")
        start = self.first_gap(place.rank)
        own = slice(start, start + place.rank)
        self.reserve(own.stop)
        self.lora_a[..., own, :] = lora_a
        self.lora_b[own] = lora_b
        row = -1 if magnitude is None else self._add_magnitude(magnitude)
        self._set(adapter, place._replace(start=start, magnitude=row))
        return adapter

    def _add_magnitude(self, magnitude: Tensor) -> int:
        rows = 0 if self.magnitude is None else self.magnitude.shape[0]
        row = next(i for i in range(rows + 1) if i not in {place.magnitude for place in self.places})
        if row == rows:
            more = self.lora_b.new_empty(1, self.out_features)
            self.magnitude = more if self.magnitude is None else torch.cat([self.magnitude, more])
        assert self.magnitude is not None
        self.magnitude[row] = magnitude
        return row

    def remove(self, adapter: int) -> None:
        """Free an adapter's id and rows. Memory is returned by :meth:`compact`.

        Raises:
            ValueError: there is no such adapter.
            RuntimeError: the factors train.
        """
        self._refuse_training("remove")
        if not 0 <= adapter < len(self) or not self.places[adapter].rank:
            raise ValueError(f"LoRAStack.remove: expected the id of an adapter, got {adapter}")
        self._set(adapter, _NOWHERE)

    def extend(self, ids: int) -> None:
        """Make room for at least ``ids`` ids in all; the new ones are free."""
        if ids > len(self):
            self._place([*self.places, *[_NOWHERE] * (ids - len(self))])

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows of rank in all; adapters keep their places."""
        missing = rows - self.lora_b.shape[0]
        if missing > 0:
            self._refuse_training("reserve")
            more = self.lora_a.new_empty(*self.lora_a.shape[:-2], missing, self.in_features)
            self.lora_a = torch.cat([self.lora_a, more], dim=-2)
            self.lora_b = torch.cat([self.lora_b, self.lora_b.new_empty(missing, self.out_features)])

    @torch.no_grad()
    def compact(self) -> None:
        """Close the gaps: every adapter keeps its id and its values, bit for bit, and the factors take Σ R (K + N)."""
        self._refuse_training("compact")
        kept = [i for i in sorted(range(len(self)), key=lambda i: self.places[i].start) if self.places[i].rank]
        places, start, rows = list(self.places), 0, []
        for i in kept:
            old = places[i]
            rows.append(torch.arange(old.start, old.start + old.rank, device=self.lora_a.device))
            places[i] = old._replace(start=start)
            start += old.rank
        index = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64, device=self.lora_a.device)
        dora = [i for i in kept if places[i].magnitude >= 0]
        magnitude = None
        if dora and self.magnitude is not None:
            magnitude = self.magnitude[[places[i].magnitude for i in dora]]
        for row, i in enumerate(dora):
            places[i] = places[i]._replace(magnitude=row)
        self.lora_a, self.lora_b, self.magnitude = self.lora_a[..., index, :], self.lora_b[index], magnitude
        self._place(places)

    def first_gap(self, rank: int) -> int:
        """First row of the first run of ``rank`` free ones; it may reach past the end."""
        if self.rows_used == self._end:
            return self._end
        start = 0
        for place in sorted(p for p in self.places if p.rank):
            if place.start - start >= rank:
                break
            start = place.start + place.rank
        return start

    def _measure(self) -> None:
        self.max_rank: int = max([0, *self.ranks])
        self.has_dora: bool = self.magnitude is not None and any(place.magnitude >= 0 for place in self.places)
        self.rows_used: int = sum(self.ranks)
        self._end: int = max((place.start + place.rank for place in self.places if place.rank), default=0)

    def _set(self, adapter: int, place: Place) -> None:
        places = [*self.places, *[_NOWHERE] * (adapter + 1 - len(self))]
        places[adapter] = place
        if place.rank:  # one more: no look at the others, so that loading N adapters costs N times one
            self.places, self._tensors = tuple(places), None
            self.max_rank = max(self.max_rank, place.rank)
            self.has_dora = self.has_dora or place.magnitude >= 0
            self.rows_used += place.rank
            self._end = max(self._end, place.start + place.rank)
        else:
            self._place(places)

    def _place(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._tensors = None  # new ones, so that a snapshot keeps its own
        self._measure()

    @property
    def table(self) -> Tensor:
        """(G, 3), or (S, G, 3) of a sliced stack: each adapter's first row, rank and row of ``magnitude``."""
        return self._made_tensors()[0]

    @property
    def scalings(self) -> Tensor:
        """(G,), or (S, G): float32."""
        return self._made_tensors()[1]

    def _made_tensors(self) -> tuple[Tensor, Tensor]:
        if self._tensors is None:
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                self._tensors = self._make_tensors()
        return self._tensors

    def _make_tensors(self) -> tuple[Tensor, Tensor]:
        of = self._ranks_and_scalings()
        table = [[(p.start, r, p.magnitude) for p, (r, _) in zip(self.places, each, strict=True)] for each in of]
        lead = (len(self.slices),) if self.is_sliced else ()
        return (
            torch.tensor(table, dtype=torch.int32, device=self.lora_a.device).reshape(*lead, len(self.places), 3),
            self.scalings_in(torch.float32),
        )

    def scalings_in(self, dtype: torch.dtype) -> Tensor:
        """``scalings`` in another dtype, from the numbers that were given: in float64, without float32's rounding."""
        scalings = [[scaling for _, scaling in each] for each in self._ranks_and_scalings()]
        lead = (len(self.slices),) if self.is_sliced else ()
        return torch.tensor(scalings, dtype=dtype, device=self.lora_a.device).reshape(*lead, len(self.places))

    def _ranks_and_scalings(self) -> list[list[tuple[int, float]]]:
        """Of each slice, and in it of each adapter."""
        each = range(len(self.slices))
        return [[p.slices[s] if p.slices else (p.rank, p.scaling) for p in self.places] for s in each]

    def _refuse_training(self, verb: str) -> None:
        if any(t is not None and t.requires_grad for t in (self.lora_a, self.lora_b, self.magnitude)):
            raise RuntimeError(
                f"LoRAStack.{verb}: expected factors that do not train; detach them, or make a new stack of "
                f"stack.factors(i)"
            )

    def __repr__(self) -> str:
        dora = sum(p.magnitude >= 0 for p in self.places)
        slices = f", slices={self.slices}" if self.is_sliced else ""
        return (
            f"LoRAStack(in_features={self.in_features}, out_features={self.out_features}{slices}, ranks={self.ranks}, "
            f"dora={dora}, dtype={self.lora_a.dtype}, device={self.lora_a.device})"
        )


def _checked(name: str, factors: Any, slices: Sequence[int] | None) -> _Given:
    if slices is None:
        lora_a, lora_b, scaling, magnitude = _checked_factors(name, *factors)
        return _Given(lora_a, lora_b.T, Place(0, lora_a.shape[0], scaling), magnitude)
    parts: list[Any] = list(factors)
    if len(parts) != len(slices):
        raise ValueError(f"LoRAStack: expected {len(slices)} slices of {name}, factors or None each, got {len(parts)}")
    given = [None if part is None else _checked_factors(f"slice {s} of {name}", *part) for s, part in enumerate(parts)]
    there = [(s, part) for s, part in enumerate(given) if part is not None]
    if not there:
        raise ValueError(f"LoRAStack: expected factors in at least one slice of {name}")
    first = there[0][1][0]
    for s, (lora_a, lora_b, _, _) in there:
        if (lora_a.shape[1], lora_b.shape[0]) != (first.shape[1], slices[s]) or lora_a.device != first.device:
            raise ValueError(
                f"LoRAStack: expected slice {s} of {name} of (K, N) = ({first.shape[1]}, {slices[s]}) on "
                f"{first.device}, got ({lora_a.shape[1]}, {lora_b.shape[0]}) on {lora_a.device}"
            )
    with_magnitude = sum(magnitude is not None for _, (*_, magnitude) in there)
    if with_magnitude not in (0, len(slices)):
        raise ValueError(f"LoRAStack: expected a magnitude in every slice of {name}, or in none")
    rank = max(part[0].shape[0] for _, part in there)
    of_a: list[Tensor] = []
    of_b: list[Tensor] = []
    for part, width in zip(given, slices, strict=True):
        lora_a, lora_b = part[:2] if part else (first.new_zeros(0, first.shape[1]), first.new_zeros(width, 0))
        missing = rank - lora_a.shape[0]
        of_a.append(torch.nn.functional.pad(lora_a, (0, 0, 0, missing)))
        of_b.append(torch.nn.functional.pad(lora_b.T, (0, 0, 0, missing)))
    own = tuple((0, 0.0) if part is None else (part[0].shape[0], part[2]) for part in given)
    magnitude = torch.cat([part[3] for _, part in there if part[3] is not None]) if with_magnitude else None
    return _Given(torch.stack(of_a), torch.cat(of_b, dim=1), Place(0, rank, there[0][1][2], slices=own), magnitude)


def _checked_factors(
    name: str, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None = None
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    tensors = [("lora_a", lora_a), ("lora_b", lora_b), *([] if magnitude is None else [("magnitude", magnitude)])]
    for key, t in tensors:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            said = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"LoRAStack: expected {key} of {name} to be a tensor of a floating dtype, got {said}")
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"LoRAStack: expected lora_a (R, K) and lora_b (N, R) of {name} to share R, "
            f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    if lora_a.shape[0] == 0:
        raise ValueError(f"LoRAStack: expected a rank of at least 1 of {name}, got 0")
    if magnitude is not None and magnitude.shape != (lora_b.shape[0],):
        raise ValueError(
            f"LoRAStack: expected magnitude of {name} of shape (N,) = ({lora_b.shape[0]},), "
            f"got {tuple(magnitude.shape)}"
        )
    number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
    if not number:
        raise TypeError(f"LoRAStack: expected scaling of {name} to be a number, got {type(scaling).__name__}")
    held = float(torch.tensor(float(scaling), dtype=torch.float32, device="cpu"))
    if not math.isfinite(held) or (held == 0.0) != (scaling == 0.0):
        raise ValueError(
            f"LoRAStack: expected scaling of {name} to be a finite number that float32 can hold, got {scaling}"
        )
    if lora_b.device != lora_a.device:
        raise ValueError(f"LoRAStack: expected lora_b of {name} on {lora_a.device} like lora_a, got {lora_b.device}")
    return lora_a, lora_b, float(scaling), magnitude
