"""LoRAPrune's importance of the elements of an adapted weight, as the formula says."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_importance_ref(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    *,
    scaling: float = 1.0,
    dim: str = "rows",
) -> Tensor:
    """Sums over each row, or each column, of Î = ((∇B A + B ∇A - ∇B ∇A) ∘ (W + s B A))².

    In float32 (float64 for a float64 W), dense.

    Args:
        weight: W (N, K).  lora_a, grad_a: A, ∇A (R, K).  lora_b, grad_b: B, ∇B (N, R); widened, never rounded.
        dim: "rows" for (N,), "columns" for (K,).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b, da, db = (t.to(wide) for t in (lora_a, lora_b, grad_a, grad_b))
    update = db @ a + b @ da - db @ da
    merged = weight.to(wide) + scaling * (b @ a)
    return (update * merged).square().sum(1 if dim == "rows" else 0)
