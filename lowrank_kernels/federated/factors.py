"""What a client sends: factors of one layer, or of a batch of layers of equal shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..finite import all_finite


class Factors(NamedTuple):
    """s B A, a change of W.

    Attributes:
        lora_a: A (..., R, K).
        lora_b: B (..., N, R), with the same leading dimensions: layers of equal shape are one batch.
        scaling: s.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-2]

    def cut(self, r: int) -> Factors:
        """The first r ranks (all where there are no more)."""
        return Factors(self.lora_a[..., :r, :], self.lora_b[..., :r], self.scaling)


def check_shares(op: str, clients: int, client_weights: Sequence[float] | None) -> list[float]:
    """c_i, which sum to 1: ``client_weights`` over their sum, or 1 / n each.

    Raises:
        ValueError: no client; weights that are negative, not finite, all zero, or of another number than the clients.
    """
    weights = [1.0] * clients if client_weights is None else list(client_weights)
    if not clients or len(weights) != clients:
        raise ValueError(f"{op}: expected one factor and one weight a client, got {clients} and {len(weights)}")
    if any(isinstance(c, bool) or not isinstance(c, Real) or not 0.0 <= c < math.inf for c in weights) or (
        not 0.0 < sum(weights) < math.inf
    ):
        raise ValueError(f"{op}: expected client_weights of at least 0, not all zero, with a finite sum, got {weights}")
    return [float(c / sum(weights)) for c in weights]


def check_scaling(op: str, scaling: float, *, divides: bool = False) -> None:
    """Raise ValueError for an s that is not a finite number, or, where it divides, not above 0."""
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        raise ValueError(f"{op}: expected scaling to be a finite number, got {scaling!r}")
    if divides and scaling <= 0.0:
        raise ValueError(f"{op}: expected scaling above 0, which the rule divides by, got {scaling!r}")


def check_rank(op: str, r: int) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{op}: expected a rank to be an integer, got {r!r}")
    if r < 1:
        raise ValueError(f"{op}: expected a rank of at least 1, got {r}")


def check_clients(op: str, clients: Sequence[Factors]) -> None:
    """Raise for factors that do not belong together.

    Raises:
        TypeError: not a list of Factors of floating tensors.
        ValueError: shapes that do not fit (ranks may differ), other devices, NaN or Inf; clients are named by place.
    """
    if not isinstance(clients, (list, tuple)) or not all(isinstance(c, Factors) for c in clients):
        raise TypeError(f"{op}: expected clients to be a list of lowrank_kernels.federated.Factors")
    for place, (a, b, s) in enumerate(clients):
        who = f"client {place}"
        for name, factor in (("lora_a", a), ("lora_b", b)):
            if not isinstance(factor, Tensor) or factor.dim() < 2 or not factor.is_floating_point():
                raise TypeError(f"{op}: expected {name} of {who} to be matrices of floats")
        check_scaling(f"{op}: {who}", s)
        first = clients[0]
        batch, k, n = first.lora_a.shape[:-2], first.lora_a.shape[-1], first.lora_b.shape[-2]
        r = a.shape[-2]
        if a.shape != (*batch, r, k) or b.shape != (*batch, n, r):
            raise ValueError(
                f"{op}: expected lora_a {(*batch, 'R', k)} and lora_b {(*batch, n, 'R')} of {who}, got "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.device != first.lora_a.device or b.device != a.device:
            raise ValueError(f"{op}: expected factors on one device, got {who} on {a.device} and {b.device}")
        if not (all_finite(a) and all_finite(b)):
            raise ValueError(f"{op}: expected finite factors, and those of {who} hold NaN or Inf; leave it out")


def padded(clients: Sequence[Factors]) -> tuple[list[Factors], float]:
    """The same s_i B_i A_i in float64, at the highest rank and one scaling, which is also returned.

    Ranks that a client lacks are zeros, of A and of B; s_i / s goes into B. s is that of the first client of the
    highest rank.
    """
    rank = max(c.rank for c in clients)
    s = next(c.scaling for c in clients if c.rank == rank)
    alike = []
    for a, b, own in clients:
        missing = rank - a.shape[-2]
        wide_a = torch.nn.functional.pad(a.detach().double(), (0, 0, 0, missing))
        wide_b = torch.nn.functional.pad(b.detach().double(), (0, missing))
        if own != s:
            check_scaling("federated", s, divides=True)
            wide_b = wide_b * (own / s)
        alike.append(Factors(wide_a, wide_b, s))
    return alike, s
