"""The weight of a linear, an embedding or a convolution as the matrix W (N, K) that a correction s B A is added to."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..weights import Weight
from ..weights import of as stored


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2): a linear that keeps its weight as (K, N). Told without importing it."""
    if type(module).__name__ != "Conv1D":
        return False
    return all(isinstance(getattr(module, size, None), int) for size in ("nx", "nf"))


def is_linear(module: nn.Module) -> bool:
    """True for an nn.Linear, transformers' Conv1D, and what keeps its weight in a format of ``weights``."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or stored(module) is not None


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def weight_shape(module: Any) -> tuple[int, ...]:
    """The shape of the module's weight by its other attributes: that of the whole, where the tensor is a shard."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, _ConvNd):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    return (module.nx, module.nf) if is_conv1d(module) else (module.out_features, module.in_features)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of W.

    - nn.Linear: (out_features, in_features), and so for transformers' Conv1D, which keeps the transpose.
    - nn.Embedding: (embedding_dim, num_embeddings): its output is W times a unit vector.
    - a convolution: (out_channels, in_channels / groups times the elements of its kernel).
    """
    first, *rest = weight_shape(module)
    return (rest[0], first) if _is_transposed(module) else (first, math.prod(rest))


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The module's weight, or a tensor in its place, as W (N, K). A view, but of a convolution's in channels_last."""
    if type(module) is nn.Linear:  # at every forward of a layer: nothing is faster
        return weight
    if isinstance(module, _ConvNd):
        return weight.flatten(1)
    return weight.T if _is_transposed(module) else weight


def frozen_weight(module: Any) -> Weight:
    """W (N, K) of a module, as ops take it: its weight as a matrix, or as stored in a format that is not dense."""
    if type(module) is nn.Linear:  # at every forward of a layer: nothing is faster
        weight: Tensor = module.weight
        return weight
    found = stored(module)
    return as_matrix(module, module.weight) if found is None else found


def weight_tensor(module: Any) -> Tensor:
    """The tensor that a module's weight lies in: ``weight``, or the codes of a format that names them otherwise."""
    weight: Tensor | None = getattr(module, "weight", None)
    found = None if weight is not None else stored(module)
    if found is not None:
        return found.parts()[0]
    assert weight is not None
    return weight


def write_matrix_(weight: Tensor, matrix: Tensor) -> None:
    """weight ← matrix, which :func:`as_matrix` made of it, where that is no view."""
    if matrix.data_ptr() != weight.data_ptr():
        weight.copy_(matrix.view(weight.shape))
