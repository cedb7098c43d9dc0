"""RAC-LoRA: a chain whose links train one factor beside a frozen random one (Malinovsky et al., arXiv 2410.08305)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .chain import Chain


def rac_lora(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_link: int,
    *,
    init: str = "orthonormal",
    **settings: Any,
) -> Chain:
    """Randomized Asymmetric Chain of LoRA.

    Link t samples one factor and freezes it, trains the other from zero, and merges. With A sampled orthonormal, one
    SGD step on B at rate γ / s² and a merge are W ← W - γ G AᵀA, a projected step of full fine-tuning, which converges
    where the same factor kept for ever does not: for an L-smooth f with γ ≤ 1/L and λ = λ_min(E[AᵀA]) = R / K,
    E‖∇f‖² ≤ 2 (f(W₀) - f*) / (λ γ T). That is for SGD; for AdamW there is no guarantee.

    Args:
        model: adapted with ``LoRAConfig(train="b")`` (samples A; backward keeps x Aᵀ and not x), or ``train="a"``.
        init: "orthonormal"; with "gaussian" the step's length depends on the sample's norm.
        (the others as for :class:`Chain`)

    Raises:
        ValueError: a layer that trains both factors, and as :class:`Chain`.
    """
    return Chain(model, optimizer, steps_per_link, init=init, one_sided=True, name="rac_lora", **settings)
