"""INT8, a scale a row, as bitsandbytes stores it (0.50.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .coded import CodedWeight, Codes, Stored, check_finite, check_matrix
from .format import register
from .rounding import check_rounding


@register
class Int8Weight(CodedWeight):
    """W = rn(q · rn(SCB_n / 127), dtype): q int8 (N, K), SCB float32 (N,), the largest |w| of each row."""

    format = "int8"
    code = Codes.INT8

    @classmethod
    def of_rows(cls, q: Tensor, scb: Tensor, dtype: torch.dtype) -> Int8Weight:
        """The weight of what bitsandbytes calls CB (N, K) and SCB (N,)."""
        # As bitsandbytes does it: times the float32 nearest to 1 / 127, no division.
        return cls(q.shape, dtype, q, scb.float() * (1.0 / 127.0), block=(1, max(1, q.shape[1])))

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        *,
        dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> Int8Weight:
        """W in 8 bits: each row over its largest |w|, rounded; first cast to float16, as bitsandbytes does.

        Args:
            weight: W (N, K), of a float dtype, finite in float16.
            dtype: of the values that it stands for; W's own by default.
            rounding: "nearest", or "stochastic": to one of the two values around, so that the mean is exact.
            generator: of stochastic rounding; torch's own by default.

        Raises:
            ValueError: a shape that is none, NaN, infinity, or what float16 cannot hold.
        """
        op = "Int8Weight.from_dense"
        check_matrix(op, weight)
        check_rounding(op, rounding)
        half = weight.detach().half()
        check_finite(op, weight=half)
        wide = half.float()
        scb = wide.abs().amax(1) if weight.shape[1] else wide.new_zeros(weight.shape[0])
        scaled = wide * (127.0 / torch.where(scb == 0, 1.0, scb))[:, None]
        if rounding == "stochastic":
            drawn = torch.rand(scaled.shape, generator=generator, device=scaled.device)
            q = torch.floor(scaled + drawn).clamp(-127, 127)
        else:
            q = torch.round(scaled)
        return cls.of_rows(q.to(torch.int8), scb, dtype or weight.dtype)

    def encoded_again(self, weight: Tensor, rounding: str) -> Int8Weight:
        return type(self).from_dense(weight, dtype=self.dtype, rounding=rounding)

    @classmethod
    def from_module(cls, module: nn.Module) -> Int8Weight | None:
        """The weight of a ``bitsandbytes.nn.Linear8bitLt``, which does not say its dtype; None for any other module."""
        weight = module._parameters.get("weight")
        if weight is None or type(module).__name__ != "Linear8bitLt":
            return None
        holder: Any = module.state if getattr(module.state, "CB", None) is not None else weight
        q, scb = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        return None if q is None or scb is None else cls.of_rows(q, scb, torch.float16)  # None: not quantised yet

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str, *, dtype: torch.dtype) -> Int8Weight:
        """The weight ``name`` of a checkpoint, from its tensors by their names there; ``dtype``, which they do not say,
        of the values.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or NaN; each by its name.
        """
        q, scb = cls.stored(tensors, name, torch.int8), cls.stored(tensors, _beside(name, "SCB"), torch.float32)
        check_finite(cls.__name__, **{_beside(name, "SCB"): scb})
        if q.dim() != 2 or scb.shape != q.shape[:1]:
            raise ValueError(f"Int8Weight: expected {name} (N, K) and its SCB (N,), got {q.shape} and {scb.shape}")
        return cls.of_rows(q, scb, dtype)


def _beside(name: str, other: str) -> str:
    return ".".join([*name.split(".")[:-1], other])
