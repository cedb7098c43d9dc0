"""Where the clients start: factors from the singular vectors of W (FeDeRA), or of what was trained sparsely (SLoRA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.lamda import leading_svd
from ..weights import FrozenWeight
from .factors import Factors, check_rank, check_scaling


@torch.no_grad()
def svd_factors(weight: Tensor | FrozenWeight, r: int, *, scaling: float = 1.0, seed: int = 0) -> Factors:
    """A = √(S/s) Vᵀ, B = U √(S/s) of a matrix's R leading singular triples U S Vᵀ: s B A is its best approximation.

    - FeDeRA starts from W's, and leaves W - s B A in the frozen weight, so that training starts at the base model.
    - SLoRA starts its second stage from those of the change that the first one has trained, over the W that it began
      with.

    Args:
        weight: (N, K), dense or of any format that has ``dense()``; the decomposition is of the whole matrix (a
            randomised one above a width of 2000), so a copy of its size is made, in float32 or wider.
        r: R, at most min(N, K).
        scaling: s, above 0. The papers have s = 1.
        seed: of the randomised decomposition.

    Raises:
        TypeError: not a matrix of floats; a rank that is not an integer.
        ValueError: a rank out of range; an s that is not above 0; NaN or Inf, or a matrix on the meta device.

    Source: Yan et al. (FeDeRA), arXiv 2404.18848; Babakniya et al. (SLoRA), arXiv 2308.06522.
    """
    if isinstance(weight, Tensor) and (weight.dim() != 2 or not weight.is_floating_point()):
        raise TypeError("svd_factors: expected weight to be a matrix (N, K) of floats")
    check_rank("svd_factors", r)
    check_scaling("svd_factors", scaling, divides=True)
    if r > min(weight.shape):
        raise ValueError(f"svd_factors: expected a rank of at most min(N, K) = {min(weight.shape)}, got {r}")
    u, sigma, vh = leading_svd(weight, r, seed)
    root = (sigma / scaling).sqrt()
    return Factors(root[:, None] * vh, u * root, scaling)


def random_blocks(shape: tuple[int, int], density: float, generator: torch.Generator, *, size: int = 16) -> Tensor:
    """SLoRA's mask, in blocks: (n, 2) int32, the (row block, column block) of each, drawn without repetition.

    The paper's mask is of single elements. Blocks are what :class:`~lowrank_kernels.nn.BlockSparseLinear` trains
    without making the whole gradient, and cost 8 bytes of position for their 1024 of values.

    Args:
        shape: (N, K).
        density: share of the blocks, at least one.
        size: of a block, a multiple of 16; those at the edges may be narrower.

    Raises:
        ValueError: a density that is not above 0 and at most 1; a size that is no multiple of 16.
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
        raise ValueError(f"random_blocks: expected density above 0 and at most 1, got {density!r}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 16 or size % 16:
        raise ValueError(f"random_blocks: expected size to be a multiple of 16, got {size!r}")
    rows, columns = (-(-side // size) for side in shape)
    count = max(1, round(density * rows * columns))
    chosen = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    return torch.stack([chosen // columns, chosen % columns], dim=1).to(torch.int32)
