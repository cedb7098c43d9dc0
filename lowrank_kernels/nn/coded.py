"""``CodedLinear``: a frozen linear whose weight is stored in few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import frozen_linear
from ..weights import CodedWeight, unpacked


class CodedLinear(nn.Module):
    """y = x Wᵀ + bias with W (N, K) as a :class:`~lowrank_kernels.weights.CodedWeight`: no gradient but that of x.

    ``weight`` holds the codes; the other tensors of the format are buffers, ``weight_1``, ``weight_2``, ...; of their
    shapes and their format the extra state tells. What wraps it (``lk.adapt``) reads them where they lie.
    """

    def __init__(self, weight: CodedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._settings = f"{weight.format} {weight.settings()}"
        codes, *others = weight.parts()
        self.weight = nn.Parameter(codes, requires_grad=False)
        self._codes_dtype = codes.dtype
        self._made: tuple[tuple[Tensor, ...], CodedWeight] | None = None  # of these tensors, whatever they hold
        self._others = tuple(f"weight_{i}" for i in range(1, 1 + len(others)))
        for name, part in zip(self._others, others, strict=True):
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def stored_weight(self) -> CodedWeight:
        """The weight as ops take it."""
        tensors = (self.weight, *(self.get_buffer(name) for name in self._others))
        if self.weight.dtype != self._codes_dtype:
            raise ValueError(
                f"CodedLinear: expected codes of {self._codes_dtype}, got {self.weight.dtype}: something has cast "
                f"them, as FSDP2's MixedPrecisionPolicy(param_dtype=...) casts 8-bit floats; use param_dtype=None and "
                f"autocast, or store the base as nf4 or int8"
            )
        if self._made is not None and not torch.compiler.is_compiling():
            known, weight = self._made
            if all(a is b for a, b in zip(known, tensors, strict=True)):
                return weight
        made = unpacked(self._settings, tensors)
        assert isinstance(made, CodedWeight)
        if not torch.compiler.is_compiling():
            self._made = tensors, made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of the tensors that hold the weight, in its order."""
        return "weight", *self._others

    @torch.no_grad()
    def store_(self, parts: Sequence[Tensor]) -> None:
        """Overwrite the weight by another one's tensors, of the same shapes and dtypes."""
        for kept, part in zip(self.stored_weight().parts(), parts, strict=True):
            kept.copy_(part)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.stored_weight(), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLinear:
        """To another device; codes and scales keep their dtypes, whatever the model is cast to."""
        codes, *others = (part.detach() for part in self.stored_weight().parts())
        super()._apply(fn, recurse)
        if self.weight.dtype != codes.dtype:
            self.weight = nn.Parameter(codes.to(self.weight.device), requires_grad=False)
        for name, part in zip(self._others, others, strict=True):
            moved = self.get_buffer(name)
            if moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self

    def get_extra_state(self) -> str:
        return self._settings

    def set_extra_state(self, state: Any) -> None:
        if state != self._settings:
            raise ValueError(f"CodedLinear: expected a weight of {self._settings!r}, got one of {state!r}")

    def extra_repr(self) -> str:
        format_ = self._settings.split(" ", 1)[0]
        return f"{self.in_features}, {self.out_features}, format={format_}, bias={self.bias is not None}"
