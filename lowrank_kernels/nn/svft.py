"""``SVFTLinear``: a frozen linear and a sparse matrix that trains between its weight's singular vectors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..finite import all_finite
from ..functional import svft_linear, svft_pattern
from ..merge import merge_lora_
from ..weights import FrozenWeight, dense
from ..weights.fingerprint import fingerprint
from .base_only import runs_base_alone
from .frozen import AroundBase, check_weight_may_be_read, check_wrappable
from .matrix import frozen_weight
from .sharded import why_not_written

PATTERNS = ("plain", "banded", "random", "top")
GAP = 1e-6
"""Singular values closer than this share of the largest have vectors that another machine may turn among themselves."""


class SVD(NamedTuple):
    """W = U diag(σ) Vᵀ in float64, thin: u (N, r), sigma (r,) descending, vh (r, K)."""

    u: Tensor
    sigma: Tensor
    vh: Tensor


def check_pattern(op: str, pattern: Any, band: Any, k: Any, seed: Any) -> None:
    """Raise ValueError or TypeError, in the op's name, for a pattern that no matrix has."""
    needed = {"banded": "band", "random": "k", "top": "k"}.get(pattern) if isinstance(pattern, str) else None
    if not isinstance(pattern, (str, Tensor, Mapping)):
        raise TypeError(f"{op}: expected pattern to be a word or places (E, 2), got {type(pattern).__name__}")
    if isinstance(pattern, str) and pattern not in PATTERNS:
        raise ValueError(f"{op}: expected pattern to be one of {', '.join(PATTERNS)}, got {pattern!r}")
    for name, value, least in (("band", band, 0), ("k", k, 1)):
        if name == needed and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(
                f"{op}: expected {name} to be an integer of at least {least} for pattern {pattern!r}, got {value!r}"
            )
        if name != needed and value is not None:
            raise ValueError(f"{op}: expected {name}=None, since this pattern does not have it, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: expected seed to be an integer, got {seed!r}")


def check_pattern_fits(op: str, r: int, pattern: Any, band: int | None, k: int | None) -> None:
    """Raise ValueError where M (r, r) has no such places."""
    if r == 0:
        raise ValueError(f"{op}: expected a weight with rows and columns, got an empty one")
    if pattern == "banded" and band is not None and band >= r:
        raise ValueError(f"{op}: expected band below r = {r} for M (r, r), got {band}; lower it, or give k = {r * r}")
    if k is not None and k > r * r:
        raise ValueError(f"{op}: expected k of at most r² = {r * r} for M (r, r), got {k}")


def svft_places(
    sigma: Tensor, pattern: str = "plain", *, band: int | None = None, k: int | None = None, seed: int = 0
) -> Tensor:
    """The places (E, 2) of M (r, r) that train, ascending, on the CPU.

    - "plain": the diagonal, r.
    - "banded": |i - j| <= band, r (2 band + 1) - band (band + 1).
    - "random": k of all, without repetition; the same for one seed everywhere.
    - "top": the k with the largest σ_i σ_j; of equal ones, the first by row, then column.

    Args:
        sigma: σ (r,), descending.
    """
    r = len(sigma)
    if pattern in ("plain", "banded"):
        offsets = torch.arange(-(band or 0), (band or 0) + 1)
        row = torch.arange(r).repeat_interleave(len(offsets))
        column = row + offsets.repeat(r)
        return torch.stack([row, column], 1)[(column >= 0) & (column < r)]
    assert k is not None
    if pattern == "random":
        flat = torch.tensor(sorted(random.Random(seed).sample(range(r * r), k)))
        return torch.stack([flat // r, flat % r], 1)
    # (i + 1)(j + 1) places have factors at least as large, and come first: beyond k there is nothing to look at.
    widths = (k // torch.arange(1, r + 1)).clamp(max=r)
    row = torch.arange(r).repeat_interleave(widths)
    column = torch.arange(len(row)) - (widths.cumsum(0) - widths).repeat_interleave(widths)
    sizes = sigma.double().cpu()
    best = torch.argsort(sizes[row] * sizes[column], descending=True, stable=True)[:k]
    return torch.stack([row, column], 1)[best.sort().values]


class SVFTLinear(AroundBase):
    """y = x Wᵀ + bias + ((x V) Mᵀ) Uᵀ with W = U Σ Vᵀ (thin SVD): the weight is U (Σ + M) Vᵀ, and M trains.

    M (r, r), r = min(N, K), is sparse, its places are fixed, and its values are 0 at the start, so that the layer then
    is the linear, bit for bit. Of U and V, only the columns that M has rows and columns for are kept: I and J of them.

    Parameters and buffers: ``base_layer.weight`` (N, K) and ``base_layer.bias`` (N,), those of the wrapped layer
    itself, frozen and not copied; ``values`` (E,), what trains; ``u`` (N, I) and ``vh`` (J, K) in W's dtype, and
    ``sigma`` (r,) float32. The SVD is made in float64 on W's device. ``u`` and ``vh`` are in the state dict: singular
    vectors have no sign of their own, and what another machine finds for the same W is another basis, in which M would
    mean something else. ``position`` (E, 2), the row and column of each value, is in the state dict too, and is no
    buffer, which averages of a model's buffers would round.

    Args:
        base_layer: a plain nn.Linear of float32, bfloat16, float16 or float64, or one that is stored in few bits.
        position: (E, 2) integers, each place of M once, in any order.
        dtype: of ``values``; default float32, or float64 over a float64 weight.
        svd: of W, where it is known.

    x (..., K) has W's dtype, or runs under autocast. ``state_dict`` always describes the unmerged layer.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason; a dtype that is not a float.
        ValueError: places outside of M or there twice; a weight that is empty, not finite, or on the meta device.

    Source: Lingam et al., arXiv 2405.19597.
    """

    made_of_weight: ClassVar = ("u", "vh", "sigma")
    """Buffers that a layer over the same W has already."""
    u: Tensor
    vh: Tensor
    sigma: Tensor

    def __init__(
        self,
        base_layer: nn.Linear,
        position: Tensor,
        *,
        dtype: torch.dtype | None = None,
        svd: SVD | None = None,
    ) -> None:
        super().__init__()
        op = "SVFTLinear"
        check_wrappable(op, base_layer)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"{op}: expected dtype to be a floating dtype, got {dtype!r}")
        svd = svd or svd_of(op, base_layer)
        weight, r = frozen_weight(base_layer), len(svd.sigma)
        position = _ascending(op, position, r)
        (rows, row), (columns, column) = (torch.unique(side, return_inverse=True) for side in position.T)
        self._position, self._rows, self._columns = position.to(torch.int32), rows, columns
        self._pattern = self._placed = svft_pattern(torch.stack([row, column]), len(rows), len(columns))
        self._svd_of = fingerprint(dense(weight))
        self._merged: Tensor | None = None
        self.weight_shared_with: tuple[str, ...] = ()

        self.base_layer = base_layer.requires_grad_(False)
        device = weight.device
        self.register_buffer("u", svd.u[:, rows.to(device)].to(weight.dtype).contiguous())
        self.register_buffer("vh", svd.vh[columns.to(device)].to(weight.dtype).contiguous())
        self.register_buffer("sigma", svd.sigma.float())
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(len(position), dtype=dtype or wide, device=device))
        self.train(base_layer.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        pattern: str | Tensor = "plain",
        *,
        band: int | None = None,
        k: int | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> SVFTLinear:
        """Wrap ``linear``, sharing and freezing its weight and bias.

        Args:
            pattern: "plain", "banded", "random" or "top", as for :func:`svft_places`; or places (E, 2).
            band: diagonals on each side, below r; "banded" alone.
            k: how many places, from 1 to r²; "random" and "top" alone.
            seed: of "random".
            dtype: as of the class.
        """
        op = "SVFTLinear"
        check_wrappable(op, linear)
        check_pattern(op, pattern, band, k, seed)
        check_pattern_fits(op, min(linear.out_features, linear.in_features), pattern, band, k)
        svd = svd_of(op, linear)
        places = svft_places(svd.sigma, pattern, band=band, k=k, seed=seed) if isinstance(pattern, str) else pattern
        return cls(linear, places, dtype=dtype, svd=svd)

    @property
    def position(self) -> Tensor:
        """(E, 2) int32, on the CPU: the row and the column of M of each of ``values``, ascending."""
        return self._position

    @property
    def merged(self) -> bool:
        """Whether the weight holds the correction."""
        return self._merged is not None

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            y: Tensor = base(x)
            return y
        check_weight_may_be_read("SVFTLinear", base)
        if self._placed.device != self.u.device:
            with torch.inference_mode(False):  # a later backward saves it
                self._placed = self._pattern.to(self.u.device)
        return svft_linear(x, frozen_weight(base), self.u, self.vh, self.values, self._placed, base.bias)

    def merge_(self) -> SVFTLinear:
        """W ← W + U M Vᵀ, in float32, rounded once; forward is then the wrapped module's. Nothing when merged.

        W as it was is kept beside it until ``unmerge_``.

        Raises:
            ValueError: as :meth:`write_`. The layer is then as it was.
        """
        if self._merged is None:
            before = (
                self.base_layer.weight.detach().clone()
                if why_not_written(self.base_layer, whole=True) is None
                else None
            )
            self.write_()
            self._merged = before
        return self

    @torch.no_grad()
    def unmerge_(self) -> SVFTLinear:
        """Put W back to what it was, bit for bit. Nothing when not merged.

        Raises:
            ValueError: a weight that cannot be written just now. The layer is then as it was.
        """
        if self._merged is not None:
            reason = why_not_written(self.base_layer, whole=True)
            if reason is not None:
                raise ValueError(f"SVFTLinear.unmerge_: expected a weight that can be changed in place, but {reason}")
            self.base_layer.weight.copy_(self._merged)
            self._merged = None
        return self

    @torch.no_grad()
    def write_(self) -> SVFTLinear:
        """W ← W + U M Vᵀ for good, in float32, rounded once: for a linear that goes on without this layer.

        Raises:
            ValueError: a weight that another module uses as well, that is stored in few bits, or that cannot be written
                just now; values that are not finite. The layer is then as it was.
        """
        op, base = "SVFTLinear.merge_", self.base_layer
        if self.weight_shared_with:
            raise ValueError(
                f"{op}: this weight is also that of {', '.join(self.weight_shared_with)}, which would change with it; "
                f"give the layer a weight of its own and clear weight_shared_with"
            )
        if isinstance(frozen_weight(base), FrozenWeight):
            raise ValueError(f"{op}: expected a dense weight to merge into; lk.dequantize_ makes it so")
        reason = why_not_written(base, whole=True)
        if reason is not None:
            raise ValueError(f"{op}: expected a weight that can be changed in place, but {reason}")
        if not all_finite(self.values.detach()):
            raise ValueError(f"{op}: expected finite values, and they hold NaN or Inf")
        weight, wide = base.weight.detach(), torch.promote_types(base.weight.dtype, torch.float32)
        row, column = self._pattern[: 2 * len(self.values)].view(2, -1).long().to(weight.device)
        m = torch.zeros(self.u.shape[1], len(self.vh), dtype=wide, device=weight.device)
        m[row, column] = self.values.detach().to(wide)
        merge_lora_(weight, m @ self.vh.to(wide), self.u, check_finite=False)
        return self

    # ---------------------------------------------------------------------------------------------------------- basis

    def basis(self) -> dict[str, Tensor]:
        """What tells ``u`` and ``vh`` from other singular vectors of the same W, without holding them.

        For U's columns ("u_") and V's ("vh_"): ``pivot``, the place of the largest element of each, and ``value``, that
        element, which give the sign back; and, where singular values are so close that the vectors are not determined
        (:data:`GAP`), ``kept``, which these are, and ``vectors``, the vectors themselves: all of them where W is not
        what it was when its SVD was made, since the model was cast or W changed.
        """
        sigma = self.sigma.double()
        gaps = torch.cat([sigma, sigma.new_zeros(1)]).diff().abs()  # to the next; the last, to the null space
        close = gaps <= GAP * sigma[:1]
        close[1:] |= close[:-1].clone()
        if fingerprint(dense(frozen_weight(self.base_layer))) != self._svd_of:
            close[:] = True
        found: dict[str, Tensor] = {}
        for side, lines, used in self._sides():
            pivot = lines.abs().argmax(1)
            kept = close[used.to(close.device)].nonzero().flatten()
            found[f"{side}_pivot"], found[f"{side}_kept"] = pivot.to(torch.int32), kept.to(torch.int32)
            found[f"{side}_value"] = lines.gather(1, pivot[:, None])[:, 0].float()
            found[f"{side}_vectors"] = lines[kept].contiguous()
        return {name: t.detach().cpu().clone() for name, t in found.items()}

    @torch.no_grad()
    def set_basis_(self, basis: Mapping[str, Tensor]) -> SVFTLinear:
        """Turn ``u`` and ``vh``, made of the same W on this machine, into those that :meth:`basis` was asked of.

        Raises:
            ValueError: a basis of other sizes, or vectors that are not those. The layer is then as it was.
        """
        made = []
        for side, lines, _ in self._sides():
            pivot, value, kept, vectors = (
                basis[f"{side}_{what}"].to(lines.device) for what in ("pivot", "value", "kept", "vectors")
            )
            count, width = lines.shape
            shapes = [tuple(t.shape) for t in (pivot, value, vectors)]
            inside = all(
                not t.numel() or (int(t.min()) >= 0 and int(t.max()) < end)
                for t, end in ((pivot, width), (kept, count))
            )
            if shapes != [(count,), (count,), (len(kept), width)] or not inside:
                raise ValueError(f"SVFTLinear.set_basis_: expected a basis of {count} vectors of {width}, got {shapes}")
            found = lines.gather(1, pivot.long()[:, None])[:, 0].float()
            turned = torch.where((found * value < 0)[:, None], -lines, lines)
            turned[kept.long()] = vectors.to(lines.dtype)
            off = (turned.gather(1, pivot.long()[:, None])[:, 0].float() - value).abs().max()
            if not off <= 16 * torch.finfo(lines.dtype).eps:
                raise ValueError(
                    f"SVFTLinear.set_basis_: expected the singular vectors that M was trained between, but those of "
                    f"this weight on this machine differ by {float(off):.2g}; merge the layer where it was trained, "
                    f"and save the model"
                )
            made.append(turned)
        self.u.copy_(made[0].T)
        self.vh.copy_(made[1])
        return self

    def _sides(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, vectors as rows, which of all r they are)."""
        return [("u", self.u.detach().T, self._rows), ("vh", self.vh.detach(), self._columns)]

    # --------------------------------------------------------------------------------------------------------- states

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As of any module; while merged, the base weight in it is the one from before."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        key = prefix + "base_layer.weight"
        if self._merged is not None and key in state:
            state[key] = self._merged.clone()
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "position"] = self._position.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "position"
        given = state_dict.get(key, self._position)
        if given.shape != self._position.shape or not torch.equal(given.cpu().to(torch.int32), self._position):
            raise ValueError(
                f"SVFTLinear: expected a state of the same places of M at {key}, got others; make the layer with those"
            )
        if prefix + "base_layer.weight" in state_dict:  # what is about to arrive is unmerged
            if self._merged is not None and self.base_layer.weight.is_meta:
                self._merged = None
            self.unmerge_()
        super()._load_from_state_dict({k: t for k, t in state_dict.items() if k != key}, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"values={len(self.values)} of {len(self.sigma)}², merged={self.merged}"
        )


def svd_of(op: str, linear: nn.Linear) -> SVD:
    """The thin SVD of a linear's weight, in float64 on its device."""
    weight = frozen_weight(linear)
    if weight.device.type == "meta":
        raise ValueError(f"{op}: expected a weight with values, got one on the meta device; load it first")
    w = dense(weight).detach().to(torch.float64)
    if not w.numel():
        raise ValueError(f"{op}: expected a weight with rows and columns, got shape {tuple(w.shape)}")
    if not all_finite(w):
        raise ValueError(f"{op}: expected a finite weight, and it holds NaN or Inf")
    return SVD(*torch.linalg.svd(w, full_matrices=False))


def _ascending(op: str, position: Any, r: int) -> Tensor:
    """(E, 2) int64 on the CPU, ascending by row, then column."""
    try:
        places = torch.as_tensor(position)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: expected position of integers (E, 2), got {position!r:.60}") from None
    if places.is_floating_point() or places.is_complex() or places.dtype == torch.bool:
        raise TypeError(f"{op}: expected position of integers (E, 2), got {places.dtype}")
    if places.dim() != 2 or places.shape[1] != 2 or not len(places):
        raise ValueError(f"{op}: expected position of shape (E, 2), E at least 1, got {tuple(places.shape)}")
    places = places.cpu().long()
    if int(places.min()) < 0 or int(places.max()) >= r:
        raise ValueError(f"{op}: expected places from 0 to {r - 1} of M (r, r), got {places.min()} to {places.max()}")
    flat = torch.sort(places[:, 0] * r + places[:, 1]).values
    if bool((flat.diff() == 0).any()):
        raise ValueError(f"{op}: expected every place of M once, got one more than once")
    return torch.stack([flat // r, flat % r], 1)
