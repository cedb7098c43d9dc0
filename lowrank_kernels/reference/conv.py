"""Convolution with a low-rank correction, over the dense sum (Hu et al., arXiv 2106.09685; PEFT's layers)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .dora import dora_column_scale_ref


def lora_conv_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    detach_norm: bool = True,
    stride: Any = 1,
    padding: Any = 0,
) -> Tensor:
    """conv(x, V) + bias with V = W + s B A; with a magnitude m of g ∘ V, g_i = m_i / ‖V_i‖₂.

    Args:
        x: (batch, C, ...).  weight: W (N, C, *kernel), of one to three dimensions.  lora_a: A (R, C, *kernel).
        lora_b: B (N, R, 1, ...).  magnitude: m, N elements.  bias: (N,).
        detach_norm: treat the norm as a constant in backward.

    Returns:
        (batch, N, ...), in the operands' dtype; differentiable as PyTorch's own operations are.
    """
    adapted = weight.flatten(1) + scaling * (lora_b.flatten(1) @ lora_a.flatten(1))
    if magnitude is not None:
        norm = (adapted.detach() if detach_norm else adapted).norm(dim=1)
        adapted = dora_column_scale_ref(magnitude.flatten(), norm)[:, None] * adapted
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    return convolve(x, adapted.view(weight.shape), bias, stride, padding)
