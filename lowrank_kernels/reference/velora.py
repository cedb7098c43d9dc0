"""VeLoRA, as the formula says (Miles et al., arXiv 2405.17991, section 3.1 and 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def velora_project_ref(x: Tensor, vector: Tensor) -> Tensor:
    """z: each row of x (M, K) as K / d sub-tokens of length d, and of each its product with v (d,): (M, K / d)."""
    return x.unflatten(1, (x.shape[1] // vector.shape[0], vector.shape[0])) @ vector.to(x.dtype)


def velora_reconstruct_ref(z: Tensor, vector: Tensor) -> Tensor:
    """x̂ = z ⊗ v, (M, K): what backward takes for x."""
    return (z[:, :, None] * vector.to(z.dtype)).flatten(1)


def velora_vector_ref(x: Tensor, length: int) -> Tensor:
    """v: the mean of the sub-tokens of x (..., K), to unit length; 1 / √d everywhere where that mean is zero.

    Returns:
        (d,), in float32 or float64.
    """
    mean = x.reshape(-1, length).to(torch.promote_types(x.dtype, torch.float32)).mean(0)
    mean = torch.where(mean.any(), mean, torch.ones_like(mean))
    return mean / torch.linalg.vector_norm(mean)


def velora_weight_grad_ref(grad_y: Tensor, z: Tensor, vector: Tensor) -> Tensor:
    """dW = dYᵀ x̂, (N, K), of y = x Wᵀ; with s Q for dY, that of LoRA's A."""
    return grad_y.T @ velora_reconstruct_ref(z, vector)


def velora_linear_ref(x: Tensor, weight: Tensor, vector: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias, with autograd's gradients of x and bias, and dW = dYᵀ x̂.

    x̂ (W - W') with a constant W' = W adds nothing to y, and x̂ to the gradient.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1]).to(wide)
    w, v = weight.to(wide), vector.to(x.dtype).to(wide)
    estimate = velora_reconstruct_ref(velora_project_ref(rows.detach(), v), v)
    y = rows @ w.detach().T + estimate @ (w - w.detach()).T
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
