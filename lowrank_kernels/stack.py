"""``LoRAStack``: the adapters of one linear, of any ranks, one after another in two tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float] | tuple[Tensor, Tensor, float, Tensor]


class Place(NamedTuple):
    """Where an adapter lies, rows ``start : start + rank`` of both factors; scaling; row of magnitudes, if any."""

    start: int
    rank: int
    scaling: float
    magnitude: int = -1


_NOWHERE = Place(0, 0, 0.0)


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
        table_and_scalings: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.lora_a, self.lora_b, self.magnitude = lora_a, lora_b, magnitude
        self.places = tuple(places)
        self.table, self.scalings = table_and_scalings or self._tensors()
        self.max_rank = max(self.ranks, default=0)

    # -------------------------------------------------------------------------------------------------- making

    @classmethod
    def from_factors(cls, adapters: Iterable[Factors]) -> LoRAStack:
        """Stack adapters given as (lora_a (R, K), lora_b (N, R), scaling), for DoRA with a magnitude (N,) as fourth.

        Factors are copied, in the widest of their dtypes; gradients of the stack's tensors reach those that train.

        Raises:
            ValueError: no adapter, shapes or devices that do not fit, a scaling that is not finite.
            TypeError: something that is not a float tensor.
        """
        given = [_checked(f"adapter {i}", *factors) for i, factors in enumerate(adapters)]
        if not given:
            raise ValueError("LoRAStack.from_factors: expected at least one adapter, got none; see LoRAStack.empty")
        first_a, first_b, *_ = given[0]
        dtype, start, dora, places = first_a.dtype, 0, 0, []
        for i, (lora_a, lora_b, scaling, magnitude) in enumerate(given):
            dtype = torch.promote_types(dtype, torch.promote_types(lora_a.dtype, lora_b.dtype))
            if lora_a.shape[1] != first_a.shape[1] or lora_b.shape[0] != first_b.shape[0]:
                raise ValueError(
                    f"LoRAStack: expected adapter {i} of (K, N) = ({first_a.shape[1]}, {first_b.shape[0]}) like "
                    f"adapter 0, got ({lora_a.shape[1]}, {lora_b.shape[0]})"
                )
            if lora_a.device != first_a.device or lora_b.device != first_a.device:
                raise ValueError(f"LoRAStack: expected adapter {i} on {first_a.device} like adapter 0")
            places.append(Place(start, lora_a.shape[0], scaling, -1 if magnitude is None else dora))
            start += lora_a.shape[0]
            dora += magnitude is not None
        magnitudes = [m.to(dtype) for *_, m in given if m is not None]
        return cls(
            torch.cat([a.to(dtype) for a, *_ in given]), torch.cat([b.to(dtype).T for _, b, *_ in given]), places,
            torch.stack(magnitudes) if magnitudes else None,
        )  # fmt: skip

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LoRAStack:
        """A stack of no adapters, to ``add`` to."""
        options: Any = {"dtype": dtype, "device": torch.device(device)}
        return cls(torch.empty(0, in_features, **options), torch.empty(0, out_features, **options), ())

    def snapshot(self) -> LoRAStack:
        """The stack as it is now: shares the factors, and no later ``add``, ``remove`` or ``compact`` changes it.

        The factors of an adapter that is removed stay readable until another adapter is added in their place.
        """
        return LoRAStack(
            self.lora_a, self.lora_b, self.places, self.magnitude, table_and_scalings=(self.table, self.scalings)
        )

    # ------------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return len(self.places)

    @property
    def in_features(self) -> int:
        return self.lora_a.shape[1]

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
    def has_dora(self) -> bool:
        return self.magnitude is not None

    @property
    def nbytes(self) -> int:
        """Of the factors and magnitudes, gaps that removals left included."""
        tensors = (self.lora_a, self.lora_b, self.magnitude)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def factors(self, adapter: int) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """(lora_a (R, K), lora_b (N, R), scaling, magnitude (N,) or None) of an adapter, as views."""
        start, rank, scaling, row = self.places[adapter]
        own = slice(start, start + rank)
        magnitude = None if row < 0 or self.magnitude is None else self.magnitude[row]
        return self.lora_a[own], self.lora_b[own].T, scaling, magnitude

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoRAStack:
        """A stack with copies on another device or in another dtype; of what is there already, itself."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device, dtype)
        return LoRAStack(self.lora_a.to(device, dtype), self.lora_b.to(device, dtype), self.places, magnitude)

    # ------------------------------------------------------------------------------------------------ changing

    @torch.no_grad()
    def add(
        self, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None = None, *, at: int | None = None
    ) -> int:
        """Copy an adapter in and return its id, the first free one unless ``at`` names one. The others stay in place.

        It goes into the first gap that holds it, or at the end; the tensors are made larger only when neither does,
        and by what is missing. With ``at`` beyond the last id, the ids between are free ones.

        Raises:
            ValueError, TypeError: as :meth:`from_factors`, factors that do not fit this stack's linear, an id that is
                taken. The stack is then as it was.
            RuntimeError: the factors train (their optimizer state would no longer fit them).
        """
        self._refuse_training("add")
        lora_a, lora_b, scaling, magnitude = _checked("the adapter", lora_a, lora_b, scaling, magnitude)
        rank, k = lora_a.shape
        if (k, lora_b.shape[0]) != (self.in_features, self.out_features):
            raise ValueError(
                f"LoRAStack.add: expected factors of (K, N) = ({self.in_features}, {self.out_features}), "
                f"got ({k}, {lora_b.shape[0]})"
            )
        ranks = self.ranks
        adapter = next((i for i, r in enumerate(ranks) if r == 0), len(ranks)) if at is None else at
        if adapter < 0 or (adapter < len(ranks) and ranks[adapter]):
            raise ValueError(f"LoRAStack.add: expected at to be a free id, got {at}")
        start = self.first_gap(rank)
        self.reserve(start + rank)
        self.lora_a[start : start + rank] = lora_a
        self.lora_b[start : start + rank] = lora_b.T
        row = -1 if magnitude is None else self._add_magnitude(magnitude)
        self._set(adapter, Place(start, rank, scaling, row))
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
        """Have ``ids`` ids in all, or more: the new ones are free."""
        if ids > len(self):
            self._place([*self.places, *[_NOWHERE] * (ids - len(self))])

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows of rank in all; adapters keep their places."""
        missing = rows - self.lora_a.shape[0]
        if missing > 0:
            self._refuse_training("reserve")
            self.lora_a = torch.cat([self.lora_a, self.lora_a.new_empty(missing, self.in_features)])
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
        self.lora_a, self.lora_b, self.magnitude = self.lora_a[index], self.lora_b[index], magnitude
        self._place(places)

    def first_gap(self, rank: int) -> int:
        """First row of the first run of ``rank`` free ones; it may reach past the end."""
        start = 0
        for place in sorted(p for p in self.places if p.rank):
            if place.start - start >= rank:
                break
            start = place.start + place.rank
        return start

    def _set(self, adapter: int, place: Place) -> None:
        places = [*self.places, *[_NOWHERE] * (adapter + 1 - len(self))]
        places[adapter] = place
        self._place(places)

    def _place(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self.table, self.scalings = self._tensors()  # new ones, so that a snapshot keeps its own
        self.max_rank = max(self.ranks, default=0)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        device = self.lora_a.device
        table = [(place.start, place.rank, place.magnitude) for place in self.places]
        return (
            torch.tensor(table, dtype=torch.int32, device=device).reshape(-1, 3),
            torch.tensor([place.scaling for place in self.places], dtype=torch.float32, device=device),
        )

    def _refuse_training(self, verb: str) -> None:
        if any(t is not None and t.requires_grad for t in (self.lora_a, self.lora_b, self.magnitude)):
            raise RuntimeError(
                f"LoRAStack.{verb}: expected factors that do not train; detach them, or make a new stack of "
                f"stack.factors(i)"
            )

    def __repr__(self) -> str:
        dora = sum(p.magnitude >= 0 for p in self.places)
        return (
            f"LoRAStack(in_features={self.in_features}, out_features={self.out_features}, ranks={self.ranks}, "
            f"dora={dora}, dtype={self.lora_a.dtype}, device={self.lora_a.device})"
        )


def _checked(
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
    if not math.isfinite(scaling):
        raise ValueError(f"LoRAStack: expected a finite scaling of {name}, got {scaling}")
    return lora_a, lora_b, float(scaling), magnitude
