"""Differential privacy of a client's part in the average."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from torch import Tensor


@dataclass(frozen=True)
class Privacy:
    """Each client's update is clipped to ‖u‖₂ ≤ C, and the average over n sampled clients gets noise of σ = z C / n.

    u is all that a client changed, as one vector. Clients count alike, whatever their examples; one that was sampled
    and sent nothing usable counts as one that changed nothing, so that n does not tell of it.

    Args:
        clipping_norm: C.
        noise_multiplier: z, of 1 or more for a strong guarantee.
        population: how many clients there are in all.
        delta: δ of the (ε, δ) that is reported.
        max_epsilon: a round that would exceed it is not begun.

    The accountant is Flower's, which is Google's ``dp-accounting``: Rényi differential privacy, one client added or
    removed, no amplification by sampling. It accounts for the factors; metrics that clients report are outside of it.

    Raises:
        ValueError: a value out of range.

    Source: McMahan et al., arXiv 1710.06963; Mironov, arXiv 1702.07476.
    """

    clipping_norm: float
    noise_multiplier: float
    population: int
    delta: float = 1e-5
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        for option in ("clipping_norm", "noise_multiplier"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                raise ValueError(f"Privacy: expected {option} to be a finite number above 0, got {value!r}")
        self.accountant()

    def accountant(self) -> RdpAccountant:
        config = PrivacyConfig(
            target_delta=self.delta,
            population_size=self.population,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
            max_epsilon=self.max_epsilon,
        )
        return RdpAccountant(config)

    def event(self, sampled: int) -> GaussianPrivacyEvent:
        """What a round with so many clients releases."""
        return GaussianPrivacyEvent(self.noise_multiplier, sampled, self.population)

    def clip(self, sent: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
        """start + u min(1, C / ‖u‖) with u = sent - start."""
        update = {name: t.double() - start[name].double() for name, t in sent.items()}
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        share = min(1.0, self.clipping_norm / norm) if norm else 1.0
        return {name: (start[name].double() + share * u).to(sent[name].dtype) for name, u in update.items()}

    def noise_(self, mean: dict[str, Tensor], sampled: int) -> None:
        """Add to every element of an average over so many clients. The seed is the operating system's."""
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        for t in mean.values():
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            t.copy_(t.double() + noise * (self.noise_multiplier * self.clipping_norm / sampled))
