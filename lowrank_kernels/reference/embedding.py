"""Embedding with a low-rank correction, over the dense sum (Hu et al., arXiv 2106.09685; PEFT's layers)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .dora import dora_column_scale_ref


def lora_embedding_ref(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None = None,
    *,
    scaling: float = 1.0,
    detach_norm: bool = True,
) -> Tensor:
    """Rows ``ids`` of V = E + s (B A)ᵀ; with a magnitude m of g ∘ V, g_j = m_j / ‖V_·j‖₂.

    Args:
        ids: integers of any shape.  weight: E (K, N).  lora_a: A (R, K).  lora_b: B (N, R).  magnitude: m (N,).
        detach_norm: treat the norm as a constant in backward.

    Returns:
        (*ids.shape, N), in the operands' dtype; differentiable as PyTorch's own operations are.
    """
    adapted = weight + scaling * (lora_b @ lora_a).T
    if magnitude is not None:
        norm = (adapted.detach() if detach_norm else adapted).norm(dim=0)
        adapted = dora_column_scale_ref(magnitude, norm) * adapted
    return F.embedding(ids, adapted)
