"""What a weight format says of itself, and the list of formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn


class FrozenWeight(ABC):
    """A frozen W (N, K) that is not stored as a dense tensor.

    Attributes:
        format: the format's name.
        shape: (N, K), of what is stored.
        dtype: of the rows that it gives, and of the x that it multiplies.
    """

    format: ClassVar[str]
    requires_grad = False
    shape: torch.Size
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.parts()[0].device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @abstractmethod
    def parts(self) -> Sequence[Tensor]:
        """The tensors that hold W, as ops carry them; the first is on W's device."""

    def settings(self) -> str:
        """What :meth:`from_parts` needs beside the parts."""
        return ""

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Sequence[Tensor], settings: str) -> FrozenWeight:
        """The weight of these parts; what ``parts()`` and ``settings()`` gave makes an equal one."""

    @classmethod
    def from_module(cls, module: nn.Module) -> FrozenWeight | None:
        """The weight of a module whose layout this format knows; None for any other module."""
        return None

    @abstractmethod
    def dense(self) -> Tensor:
        """W (N, K) as a new tensor of its dtype, exactly as the format defines it."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of :meth:`dense`."""
        return self.dense()[start:stop]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias."""
        return nn.functional.linear(x, self.dense(), None if bias is None else bias.to(x.dtype))

    def grad_product(self, grad_y: Tensor) -> Tensor:
        """dY W."""
        return grad_y @ self.dense()

    # As a tensor is asked by checks and plans.

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int | None = None) -> Any:
        strides = (self.shape[1], 1)
        return strides if dim is None else strides[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def detach(self) -> FrozenWeight:
        return self


FORMATS: dict[str, type[FrozenWeight]] = {}
"""By name, in the order in which modules are asked."""
F = TypeVar("F", bound=type[FrozenWeight])


def register(format_: F) -> F:
    """Add a format; its name must be new."""
    if format_.format in FORMATS:
        raise ValueError(f"weights: expected a new format's name, got {format_.format!r} again")
    FORMATS[format_.format] = format_
    return format_


def unpacked(name: str, parts: Sequence[Tensor]) -> FrozenWeight:
    """The weight that an op carried as "format settings" and parts."""
    format_, _, settings = name.partition(" ")
    return FORMATS[format_].from_parts(parts, settings)
