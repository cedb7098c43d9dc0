"""SHERL's side path, in plain PyTorch: of one token, and step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def side_feature_ref(h: Tensor, down: Tensor, mix: Tensor, gate: Tensor) -> Tensor:
    """u = ReLU(D h), then (E u + u) ∘ σ(F u). h (K,), D (R, K), E and F (R, R) -> (R,)."""
    u = (down @ h).relu()
    return (mix @ u + u) * (gate @ u).sigmoid()


def side_merge_ref(
    shallow: Sequence[Tensor], deep: Tensor, score: Tensor, out: Tensor, g: Tensor, last: Tensor
) -> Tensor:
    """O ReLU(Σ_j weight_j u_j + u_deep) + tanh(g / 0.1) h_last, of one token.

    weight_j = a_j / Σ_i a_i with a_j = ReLU(w · (u_j ∘ u_deep)) / ρ_j, ρ_j = Σ_i ReLU(cos(u_j, u_i)); the cosine with a
    zero vector is 0, a_j of a zero u_j is 0, and all weights are 0 where all a_j are. Source: Diao et al., arXiv
    2407.07523, section 3.
    """
    amounts = []
    for u in shallow:
        redundancy = torch.zeros_like(g)
        for other in shallow:
            norms = u.norm() * other.norm()
            if norms > 0:
                redundancy = redundancy + (u @ other / norms).relu()
        amount = (score * (u * deep)).sum().relu()
        amounts.append(amount / redundancy if redundancy > 0 else torch.zeros_like(g))
    total = sum(amounts, torch.zeros_like(g))
    z = deep
    for u, amount in zip(shallow, amounts, strict=True):
        if total > 0:
            z = z + amount / total * u
    return out @ z.relu() + (g / 0.1).tanh() * last
